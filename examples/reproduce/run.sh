#!/usr/bin/env bash
# The experiments of examples/paper in a container. Builds the image if there is none, and runs examples/paper/run.sh in
# it, with the results in runs/paper of this checkout. Interrupted, the same command goes on where it was.
#
#     examples/reproduce/run.sh [arguments of examples/paper/run.sh, but for --output]
#
# ENGINE is docker or podman; by default the one that is installed. With --gpu the image is megamult:gpu, else
# megamult:cpu. PIP_EXTRA_INDEX_URL reaches the build: with PyTorch's CPU index the image is several GB smaller.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
engine="${ENGINE:-$(command -v docker || command -v podman || true)}"
if [[ -z "$engine" ]]; then
    echo "error: neither docker nor podman is installed: install one, or call examples/paper/run.sh, which needs none" >&2
    exit 2
fi

target=cpu
options=(--rm --init --shm-size 1g -v "$root/runs:/opt/megamult/runs")
arguments=()
while (($#)); do
    case "$1" in
        --output | --output=*)
            echo "error: $1: results are written to $root/runs/paper; leave it out" >&2
            exit 2
            ;;
        --gpu)
            target=gpu
            options+=(--gpus all --ipc host --ulimit memlock=-1)
            arguments+=("$1")
            ;;
        --corpus | --corpus=*)
            # The folder of the corpus is mounted, because the container sees no other file of this machine.
            if [[ "$1" == --corpus ]]; then
                shift
                prefix="${1:?--corpus needs a prefix}"
            else
                prefix="${1#--corpus=}"
            fi
            options+=(-v "$(cd -- "$(dirname -- "$prefix")" && pwd -P):/corpus:ro")
            arguments+=(--corpus "/corpus/$(basename -- "$prefix")")
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

image="megamult:$target"
build=(--target "$target" -t "$image")
# What the image writes to runs/ then belongs to the caller. Root is in every image, and its number cannot be given anew.
if (($(id -u))); then build+=(--build-arg "UID=$(id -u)"); else options+=(--user 0); fi
if [[ -n "${PIP_EXTRA_INDEX_URL:-}" ]]; then build+=(--build-arg PIP_EXTRA_INDEX_URL); fi
if ! "$engine" image inspect "$image" >/dev/null 2>&1; then "$engine" build "${build[@]}" "$root"; fi

mkdir -p "$root/runs"
if [[ -t 0 && -t 1 ]]; then options+=(-it); fi
exec "$engine" run "${options[@]}" "$image" examples/paper/run.sh "${arguments[@]}"
