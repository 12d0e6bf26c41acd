#!/usr/bin/env bash
# Makes .venv ready and, when sourced, puts it to use in this shell:
#
#     source launch/setup_env.sh
#
# Needs Python 3.11 or later and a C++ compiler. The first time it installs the package with the pins
# of constraints.txt; afterwards it only checks, in well under a second. Where pip looks for packages is pip's own
# configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf). Reads, all optional:
#
#     MEGAMULT_EXTRAS       extras of setup.py to install, separated by commas (test, export)
#     MEGAMULT_PYTHON       the Python to make .venv with
#     TORCH_EXTENSIONS_DIR  where compiled operators are kept (.venv/torch_extensions)
#
# Sets PATH, VIRTUAL_ENV, TORCH_EXTENSIONS_DIR, MEGAMULT_GPUS (how many CUDA GPUs torch sees) and, where that is 0,
# DS_ACCELERATOR=cpu.

megamult_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced. The work is done in a process of its own, so that its strictness leaves this shell as it was.
    MEGAMULT_GPUS="$(bash "$megamult_root/launch/setup_env.sh" --count-gpus)" || return 1
    export MEGAMULT_GPUS
    export VIRTUAL_ENV="$megamult_root/.venv"
    # First in PATH: an operator is compiled again whenever another ninja is found.
    [[ "$PATH" == "$VIRTUAL_ENV/bin:"* ]] || export PATH="$VIRTUAL_ENV/bin:$PATH"
    # Inside .venv, because the build depends on its paths: two checkouts that share a folder undo each other's.
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
    [[ "$MEGAMULT_GPUS" != 0 ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    unset megamult_root
    return 0
fi

set -euo pipefail
exec 3>&1 1>&2 # what is said goes to stderr; stdout is for the one number that --count-gpus prints
cd -- "$megamult_root"
venv="$megamult_root/.venv"
stamp="$venv/.megamult-installed" # line 1: hash of what was installed; line 2: its extras

say() { printf 'megamult: %s\n' "$*"; }
die() {
    say "error: $*"
    exit 1
}

# Is there an NVIDIA GPU here at all? Quick, and needs no torch.
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
        say "warning: this machine has an NVIDIA GPU, but the torch in .venv cannot use it; going on with the CPU." \
            "See why: .venv/bin/python -c 'import torch; print(torch.version.cuda); torch.zeros(1).cuda()'." \
            "If that prints None, torch is a CPU build: let pip find a CUDA build, remove .venv and start again."
}

# What a Python lacks for our purpose, one word each; "version" when it is too old or does not start.
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

make_venv() {
    local python candidate missing=version lacking
    if [[ -n "${MEGAMULT_PYTHON:-}" ]]; then
        local candidates=("$MEGAMULT_PYTHON")
    else # 3.11 first: the tested one
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
    say "making .venv with $python ($("$python" -V))"
    "$python" -m venv --clear "$venv"
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
            "used. Debian, Ubuntu: apt-get install python$version-dev, or remove .venv and name another Python in" \
            "MEGAMULT_PYTHON."
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

# A process killed while it compiled an operator leaves a lock file, for which every later one waits for ever.
remove_stale_locks() {
    local lock
    for lock in "$TORCH_EXTENSIONS_DIR"/*/lock; do
        [[ -e "$lock" ]] || continue
        "$venv/bin/python" - "$lock" <<'PY'
import glob, os, sys, time

lock, patience = sys.argv[1], 120  # seconds; another machine may be compiling into a shared folder


def held() -> bool:
    """Does a process of this machine compile here? It has the lock open; its ninja, alive or orphaned, works here."""
    for pattern, target in (("fd/*", lock), ("cwd", os.path.dirname(lock))):
        for link in glob.glob("/proc/[0-9]*/" + pattern):
            try:
                if os.path.samefile(link, target):
                    return True
            except OSError:  # gone, or not ours to see
                pass
    return False


told = False
try:
    while held() or time.time() - os.path.getmtime(lock) < patience:
        if not told:
            print(f"megamult: waiting for {lock}: another process may be compiling there", file=sys.stderr)
        told = True
        time.sleep(1)
    os.remove(lock)
    print(f"megamult: removed {lock}, left by a process that is gone", file=sys.stderr)
except FileNotFoundError:  # released
    pass
PY
    done
}

# Compiles DeepSpeed's shared-memory collectives now, once, instead of in every rank of the first run.
warm_shm_op() {
    local log="$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm.log" done_file="$TORCH_EXTENSIONS_DIR/.megamult-compiled"
    remove_stale_locks
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

# One set-up at a time in a checkout; two pips would spoil one another's work.
if command -v flock >/dev/null; then
    exec 9<"$megamult_root"
    flock 9
fi

# The scripts in .venv/bin hold its path, so a moved .venv is made anew, like one whose Python is gone.
if ! "$venv/bin/python" -c '' 2>/dev/null || ! grep -qF -- "$venv" "$venv/bin/activate"; then make_venv; fi
[[ "$(lacks "$venv/bin/python")" != *version* ]] ||
    die "$("$venv/bin/python" -V) in .venv is older than 3.11. Remove .venv and start again."
"$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip
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
    export PIP_USER=0 # an install for the user would miss .venv
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install -c constraints.txt)
    # First pip itself: older ones download all of torch to read its requirements.
    "${pip[@]}" -q --upgrade pip || say "warning: pip could not be updated; going on with the one that is there"
    check_torch_build
    say "installing into .venv (a few minutes the first time)"
    "${pip[@]}" -e ".${extras:+[$extras]}"
    printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
fi
count_gpus
if [[ "$gpus" == 0 ]]; then warm_shm_op; fi
if [[ "${1:-}" == --count-gpus ]]; then echo "$gpus" >&3; fi
