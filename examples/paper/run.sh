#!/usr/bin/env bash
# Experiments of arXiv 2601.04890 at a size for two cores, at most 90 minutes: trains what is missing, and writes
# runs/paper/r1/report.md with a verdict for each claim, and plots. Interrupted, the same command goes on where it was;
# runs that are complete are not repeated.
#
#     examples/paper/run.sh [--full | --gpu --corpus PREFIX] [--only E5 ...] [--seeds 1 2 3] [--list | --report | --run N]
#
# As a job array, one run per task, with a report at the end (the default corpus is made by the first task):
#
#     sbatch --array=1-21 --signal=B:TERM@120 --wrap "exec examples/paper/run.sh"
#     examples/paper/run.sh --report
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
export MEGAMULT_EXTRAS=reproduce
# shellcheck source=launch/setup_env.sh
source "$root/launch/setup_env.sh"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for `examples`
# In this process' place, so that a signal to run.sh reaches it.
exec python -m examples.paper.package "$@"
