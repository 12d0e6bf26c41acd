#!/usr/bin/env bash
# With and without multipliers on the default corpus, three seeds each: trains the quickstart's model six times and
# writes report.md and curves.png. About 20 minutes on two cores without a GPU. Interrupted, the same command goes on
# where it was; runs that are complete are not repeated.
#
#     examples/reproduce/run.sh [--steps N] [--seeds 1 2 3] [--output DIR] [-- further keys of launch/pretrain.py]
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
export MEGAMULT_EXTRAS=reproduce
# shellcheck source=launch/setup_env.sh
source "$root/launch/setup_env.sh"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for `examples`
# In this process' place, so that a signal to run.sh reaches it.
exec python "$root/examples/reproduce/train.py" "$@"
