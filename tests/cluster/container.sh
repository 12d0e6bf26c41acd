#!/usr/bin/env bash
# Builds the Dockerfile's images without a Docker engine and runs what they are for inside, without a network. As root.
#
#     tests/cluster/container.sh [--gpu] [--keep FOLDER]
#
# The base images are stand-ins of tests/cluster/image_base.sh, under the names that the Dockerfile gives in FROM: the
# target cpu is built from Debian with Debian's Python 3.11. With --gpu the target gpu is built too, from one whose torch
# only says that it is NVIDIA's: that runs every instruction, and shows that this torch stays; CUDA and NCCL it has not.
# pip inside is told what pip outside is told. --keep holds images and layers in FOLDER, for the next time. The table of
# steps goes to standard output.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
folder="" targets=(cpu)
while [[ $# != 0 ]]; do
    case "$1" in
        --gpu) targets+=(gpu) ;;
        --keep)
            folder="$(mkdir -p -- "$2" && cd -- "$2" && pwd -P)"
            shift
            ;;
        *)
            sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
            exit 2
            ;;
    esac
    shift
done
[[ "$EUID" == 0 ]] || {
    echo "error: building without a Docker engine needs root" >&2
    exit 1
}
tests/cluster/install.sh --all
if [[ -z "$folder" ]]; then
    folder="$(mktemp -d)"
    trap 'buildah rmi --all --force >"$folder/rmi.log" 2>&1 || true; rm -rf "$folder"' EXIT
fi

# One store for buildah and podman, apart from the machine's own.
export CONTAINERS_STORAGE_CONF="$folder/storage.conf"
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "$folder/storage" "$folder/run" >"$CONTAINERS_STORAGE_CONF"

table=()
failed=0
# step NAME LOG COMMAND...: runs it, its words into LOG, its result and seconds into the table.
step() {
    local what="$1" log="$folder/$2.log" began=$SECONDS result=ok
    shift 2
    echo "$what ..." >&2
    if [[ "$failed" != 0 ]]; then
        result="not run"
    elif ! "$@" >"$log" 2>&1; then
        result=FAILED failed=1
        tail -n 40 "$log" >&2
    fi
    table+=("| $what | $result | $((SECONDS - began)) |")
}

base_of() { sed -n "s/^ARG ${1^^}_BASE=//p" Dockerfile; }

# pip's settings outside become a pip.conf for inside, given as a secret; the files and folders on this machine that it
# names are mounted in their place. Nothing of either stays in the image but empty folders to mount on.
pip_conf="$folder/pip.conf"
python3 - "$pip_conf" "$folder/mounts" <<'PY'
import os, re, subprocess, sys

keys = "cert|timeout|proxy|trusted-host|no-index|index-url|extra-index-url|find-links"
wanted = re.compile(rf"(?:global|install|:env:)\.({keys})='(.*)'")
said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
settings: dict[str, list[str]] = {}
for key, value in wanted.findall(said.stdout):
    words = value.replace("\\n", " ").split()
    settings[key] = [*settings.get(key, []), *(word for word in words if word not in settings.get(key, []))]
# The pages of an index in a folder name files in a folder beside it.
mounts = {
    os.path.dirname(word.removeprefix("file://").rstrip("/")) if word.startswith("file://") else word
    for words in settings.values()
    for word in words
}
with open(sys.argv[1], "w") as file:
    file.write("[global]\n" + "".join(f"{key} = {' '.join(words)}\n" for key, words in settings.items()))
with open(sys.argv[2], "w") as file:
    file.writelines(f"{path}\n" for path in sorted(mounts) if path.startswith("/") and os.path.exists(path))
PY
mounts=()
while read -r path; do mounts+=(--volume "$path:$path:ro"); done <"$folder/mounts"

# The functions below are called by `step`.
# shellcheck disable=SC2329
build() {
    buildah build --isolation chroot --pull-never --layers --format docker --target "$1" \
        --secret "id=pip_conf,src=$pip_conf" "${mounts[@]}" --tag "megamult:$1" .
}

# inside TARGET COMMAND...: in a fresh container without a network. runc, because crun refuses mixed cgroups; limits low
# enough for any machine, because podman's own are often above what root may set.
# shellcheck disable=SC2329
inside() {
    podman --cgroup-manager cgroupfs --events-backend file --runtime runc run --rm --pull never \
        --no-healthcheck --network none --shm-size 1g --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 \
        "megamult:$1" "${@:2}"
}

# clean TARGET: nothing of pip's settings is left, nor a cache.
# shellcheck disable=SC2016,SC2329
clean() {
    inside "$1" bash -euc 'test "$(id -u)" = 1000
        test ! -s /etc/pip.conf
        test -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}"
        test ! -e ~/.cache/pip
        test ! -e .git'
}

for target in "${targets[@]}"; do
    base="$(base_of "$target")"
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        CPU_BASE="$(base_of cpu)"
        export CPU_BASE
        options=()
        if [[ "$target" == gpu ]]; then options=(--volume "$pip_conf:/etc/pip.conf:ro" "${mounts[@]}"); fi
        step "$target: stand-in for $base" "$target-base" \
            tests/cluster/image_base.sh "$target" "$base" "$folder" "${options[@]}"
    fi
    step "$target: build, with the check of the image" "$target-build" build "$target"
    step "$target: no setting of pip, no cache, not root" "$target-clean" clean "$target"
    if [[ "$target" == gpu ]]; then
        step "$target: docker/check_image.py --base-torch" "$target-check" \
            inside "$target" python docker/check_image.py --base-torch
    else
        step "$target: docker/check_image.py" "$target-check" inside "$target" python docker/check_image.py
        step "$target: launch/quickstart.sh, 20 steps" "$target-quickstart" inside "$target" launch/quickstart.sh \
            --train.steps 20 --train.eval_every 20 --optimizer.warmup_steps 2 --optimizer.decay_steps 10
        step "$target: examples/paper/run.sh, the report of no run" "$target-paper" \
            inside "$target" examples/paper/run.sh --only headline --report
        step "$target: launch/test.sh, smoke" "$target-tests" inside "$target" \
            launch/test.sh -q tests/test_config.py tests/parameters/test_spec.py tests/parameters/test_rectangles.py tests/multipliers
    fi
done

echo
echo "| step | result | seconds |"
echo "|---|---|---|"
printf '%s\n' "${table[@]}"
for target in "${targets[@]}"; do
    echo "megamult:$target: $(buildah images --format '{{.Size}}' "megamult:$target" || true)"
done
exit "$failed"
