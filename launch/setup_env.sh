#!/usr/bin/env bash
# Prepares this checkout's environment, .venv. When sourced, also activates it in this shell:
#
#     source launch/setup_env.sh
#
# Needs Python 3.11 or later and a C++ compiler. The first time it installs the package with the pins
# of constraints.txt; afterwards it only checks, in well under a second. pip's own configuration (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) says where pip looks for packages. Reads these variables, all optional:
#
#     MEGAMULT_EXTRAS       extras of setup.py to install, separated by commas (test, export, corpora)
#     MEGAMULT_PYTHON       the Python to make the environment with
#     TORCH_EXTENSIONS_DIR  where compiled operators are kept (default: torch_extensions in the environment)
#
# Sets PATH, VIRTUAL_ENV, TORCH_EXTENSIONS_DIR, MEGAMULT_GPUS (how many CUDA GPUs torch sees) and, if there are
# none, DS_ACCELERATOR=cpu.
#
# An environment that another checkout made is never changed. .venv is such an environment if it is a link to one, or if
# it came along when the checkout was moved, copied or mounted elsewhere. It is then left as it is, and .venv-NUMBER,
# where NUMBER is a hash of the checkout's path, is made and used instead.

megamult_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced. Forget the folder of operators that the setup_env.sh of another checkout set in this shell.
    [[ "${TORCH_EXTENSIONS_DIR-}" != "${VIRTUAL_ENV-}/torch_extensions" ]] || unset TORCH_EXTENSIONS_DIR
    # Work in a separate process, so that `set -euo pipefail` does not reach this shell.
    megamult_report="$(bash "$megamult_root/launch/setup_env.sh" --report)" || return 1
    export MEGAMULT_GPUS="${megamult_report%%$'\n'*}"
    export VIRTUAL_ENV="${megamult_report#*$'\n'}"
    # Put the environment first in PATH, because operators are compiled again whenever another ninja is found.
    [[ "$PATH" == "$VIRTUAL_ENV/bin:"* ]] || export PATH="$VIRTUAL_ENV/bin:$PATH"
    # Keep operators inside the environment, because their build depends on its paths: two checkouts that shared a
    # folder would overwrite each other's operators.
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
    [[ "$MEGAMULT_GPUS" != 0 ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    unset megamult_root megamult_report
    return 0
fi

set -euo pipefail
exec 3>&1 1>&2 # messages go to stderr; stdout is for what --report prints: the number of GPUs, the environment
cd -- "$megamult_root"

say() { printf 'megamult: %s\n' "$*"; }
die() {
    say "error: $*"
    exit 1
}

# Is there an NVIDIA GPU on this machine? This check is quick and needs no torch.
has_gpu() {
    [[ "${CUDA_VISIBLE_DEVICES-all}" != "" && "${CUDA_VISIBLE_DEVICES-all}" != "-1" ]] || return 1
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L >/dev/null 2>&1
}

# Sets gpus: how many CUDA GPUs torch can use.
count_gpus() {
    gpus=0
    has_gpu || return 0
    gpus="$("$venv/bin/python" -c '
import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
    [[ "$gpus" != 0 ]] ||
        say "warning: this machine has an NVIDIA GPU, but ${venv##*/}'s torch cannot use it; going on with the CPU." \
            "See why: ${venv##*/}/bin/python -c 'import torch; print(torch.version.cuda); torch.zeros(1).cuda()'." \
            "If that prints None, torch is a CPU build: let pip find a CUDA build, remove ${venv##*/} and start again."
}

# Prints what the Python $1 lacks, one word per line: venv, headers; or "version" if it is too old or does not start.
lacks() {
    "$1" - 2>/dev/null <<'PY' || echo version
import os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print("venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("headers")
PY
}

# Prints what this checkout writes into each environment that it makes: the checkout's path and its number. The number
# distinguishes checkouts that have the same path, each in its own container. The path distinguishes a checkout from its
# copies, which have the same number.
owner() {
    printf '%s\n' "$megamult_root" && cat .venv-id 2>/dev/null
}

# Did this checkout make the environment $1?
is_ours() { [[ "$(head -n 2 "$1/.megamult-owner" 2>/dev/null)" == "$(owner)" ]]; }

# May what is at $1 be deleted? Only if this checkout made it on this machine: an environment from another machine may
# work there, and jobs may use it.
is_disposable() { is_ours "$1" && [[ "$(tail -n 1 "$1/.megamult-owner")" == "$(uname -n)" ]]; }

# Is there nothing at $1, or an empty folder?
is_free() { [[ ! -e "$1" && ! -L "$1" ]] || { [[ -d "$1" ]] && [[ -z "$(ls -A "$1/")" ]]; }; }

# Does the environment $1 work at this path? The scripts in its bin contain the path that it was made at.
works() { "$1/bin/python" -c '' 2>/dev/null && grep -qsF -- "$1" "$1/bin/activate" "$1/bin/pip"; }

# May $1 be used as it is? It must work, and be made by this checkout or by hand (no link, no owner file).
is_usable() { works "$1" && { is_ours "$1" || [[ ! -L "$1" && ! -e "$1/.megamult-owner" ]]; }; }

# Sets venv to the environment of this checkout, and makes it if necessary.
choose_venv() {
    local number
    number="$(printf %s "$megamult_root" | sha256sum | cut -c 1-8)"
    for venv in "$megamult_root/.venv" "$megamult_root/.venv-$number"; do
        if is_usable "$venv"; then return; fi
    done
    for venv in "$megamult_root/.venv" "$megamult_root/.venv-$number"; do
        if is_free "$venv" || is_disposable "$venv"; then
            make_venv
            return
        fi
        say "${venv##*/} $(fault_of "$venv"): it is left as it is."
    done
    die "no name is left for an environment: move .venv-$number away."
}

# Prints why the environment $1 is not used.
fault_of() {
    local made_for
    made_for="$({ head -n 1 "$1/.megamult-owner" ||
        sed -nE "s/^ *(export )?VIRTUAL_ENV=['\"]?(\/[^'\"]*).*/\2/p" "$1/bin/activate"; } 2>/dev/null)" || true
    if [[ -L "$1" ]]; then
        echo "is a link to $(readlink -m "$1"), which this checkout did not make"
    elif [[ -n "$made_for" && "$made_for" != "$1" && "$made_for" != "$megamult_root" ]]; then
        echo "was made for $made_for (moved, copied, or seen from elsewhere)"
    else
        echo "does not work, and was not made by this checkout on this machine"
    fi
}

# Makes the environment $venv. What this checkout made at that path earlier is deleted.
make_venv() {
    local python candidate missing=version lacking
    if [[ -n "${MEGAMULT_PYTHON:-}" ]]; then
        local candidates=("$MEGAMULT_PYTHON")
    else # 3.11 first, because it is the tested version
        local candidates=(python3.11 python3.12 python3.13 python3 python3.14 python)
    fi
    for candidate in "${candidates[@]}"; do
        candidate="$(command -v "$candidate")" || continue
        lacking="$(lacks "$candidate")"
        [[ "$lacking" != *version* ]] || continue
        if [[ -z "$lacking" || "$missing" == version ]]; then
            python="$candidate" missing="$lacking"
        fi
        [[ -n "$missing" ]] || break
    done
    local version
    case "$missing" in
        *version*)
            die "no Python 3.11 or later among: ${candidates[*]}. Install one (Debian, Ubuntu: apt-get install" \
                "python3.11 python3.11-venv python3.11-dev) or name it in MEGAMULT_PYTHON."
            ;;
        *venv*)
            version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
            die "$python cannot make virtual environments. Debian, Ubuntu: apt-get install python$version-venv," \
                "or name another Python in MEGAMULT_PYTHON."
            ;;
    esac
    say "making ${venv##*/} with $python ($("$python" -V))"
    [[ -s .venv-id ]] || printf '%s\n' "$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')" >.venv-id
    mkdir -p "$venv"
    { owner && uname -n; } >"$venv/.megamult-owner" # first, so that the folder is ours even if this is interrupted
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name .megamult-owner -exec rm -rf {} +
    "$python" -m venv "$venv"
}

# Without a GPU, DeepSpeed compiles its shared-memory collectives; with one, torch compiles kernels. Say what is missing
# before a long install.
check_compiler() {
    local cxx="${CXX:-c++}" version
    command -v "${cxx%% *}" >/dev/null ||
        die "no C++ compiler ($cxx): torch and DeepSpeed compile kernels when they are first used." \
            "Debian, Ubuntu: apt-get install g++"
    if [[ "$(lacks "$venv/bin/python")" == *headers* ]]; then
        version="$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        die "the header files of Python $version are missing: torch and DeepSpeed compile kernels when they are first" \
            "used. Debian, Ubuntu: apt-get install python$version-dev, or remove ${venv##*/} and name another Python" \
            "in MEGAMULT_PYTHON."
    fi
    [[ "$megamult_root" != *[[:space:]]* ]] ||
        die "the path '$megamult_root' has a space in it, and DeepSpeed's operators do not compile there." \
            "Move the folder."
}

# Asks pip which torch it would take (metadata only) and warns when that does not fit the machine.
check_torch_build() {
    local build
    if compgen -G "$venv/lib/python3*/site-packages/torch/version.py" >/dev/null; then return; fi
    build="$("$venv/bin/python" -m pip install -q --dry-run --no-deps --report - -c constraints.txt torch 2>/dev/null |
        "$venv/bin/python" -c '
import json, sys
requires = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
print("cuda" if any(name.startswith(("nvidia-", "cuda-")) for name in requires) else "cpu")' 2>/dev/null)" ||
        return 0 # the install itself will say what is wrong
    if [[ "$build" == cuda ]] && ! has_gpu; then
        say "warning: no GPU is visible, and pip is about to download the CUDA build of torch: several GB." \
            "To get the CPU build (about 200 MB), stop here, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index" \
            "(pytorch.org, 'Start locally', shows it) or PIP_FIND_LINKS to a folder with a CPU wheel, and start again."
    elif [[ "$build" == cpu ]] && has_gpu; then
        say "warning: this machine has an NVIDIA GPU, but pip's indexes lead to a build of torch without CUDA." \
            "To use the GPU, stop here, choose a CUDA index (pytorch.org, 'Start locally') and start again."
    fi
}

# Compiles DeepSpeed's shared-memory collectives now, once, instead of in every rank of the first run.
warm_shm_op() {
    local log="$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm.log" done_file="$TORCH_EXTENSIONS_DIR/.megamult-compiled"
    # Remove the lock that a killed compilation may have left: every later process would wait for it for ever.
    "$venv/bin/python" megamult/distributed/extensions.py "$TORCH_EXTENSIONS_DIR"
    if [[ "$(cat "$done_file" 2>/dev/null)" == "$wanted" ]]; then return; fi
    check_compiler
    say "compiling DeepSpeed's shared-memory collectives (half a minute)"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    PATH="$venv/bin:$PATH" DS_ACCELERATOR=cpu "$venv/bin/python" -c \
        'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >"$log" 2>&1 || {
        tail -n 20 "$log"
        die "DeepSpeed's shared-memory collectives did not compile; the whole log is $log."
    }
    echo "$wanted" >"$done_file"
}

# Let only one set-up at a time run in a checkout, because two pips would spoil each other's work.
if command -v flock >/dev/null; then
    exec 9<"$megamult_root"
    flock 9
fi

choose_venv
[[ "$(lacks "$venv/bin/python")" != *version* ]] ||
    die "$("$venv/bin/python" -V) in ${venv##*/} is older than 3.11. Remove ${venv##*/} and start again."
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip
stamp="$venv/.megamult-installed" # line 1: hash of what was installed; line 2: its extras
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"

wanted="$({ cat setup.py constraints.txt && "$venv/bin/python" -V && echo "$venv"; } | sha256sum | cut -d ' ' -f 1)"
{ read -r installed && read -r extras; } 2>/dev/null <"$stamp" || { installed="" extras=""; }
IFS=, read -ra requested <<<"${MEGAMULT_EXTRAS:-}"
for extra in "${requested[@]}"; do
    if [[ ",$extras," != *",$extra,"* ]]; then
        extras="${extras:+$extras,}$extra"
        installed=""
    fi
done

if [[ "$installed" != "$wanted" ]]; then
    check_compiler
    export PIP_USER=0 # with 1, pip would install outside the environment
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install -c constraints.txt)
    # Update pip first, because older versions download all of torch to read its requirements.
    "${pip[@]}" -q --upgrade pip || say "warning: pip could not be updated; going on with the one that is there"
    check_torch_build
    say "installing into ${venv##*/} (a few minutes the first time)"
    "${pip[@]}" -e ".${extras:+[$extras]}"
    printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
fi
count_gpus
if [[ "$gpus" == 0 ]]; then warm_shm_op; fi
if [[ "${1:-}" == --report ]]; then printf '%s\n%s\n' "$gpus" "$venv" >&3; fi
