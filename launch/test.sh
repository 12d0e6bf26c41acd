#!/usr/bin/env bash
# Makes .venv with what the tests need, then runs tests:
#
#     launch/test.sh             every test, by three workers
#     launch/test.sh --fast      for every edit: without the tests that start processes, except one launch of two ranks
#     launch/test.sh ARGUMENTS   those that pytest's arguments choose, in one process
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export MEGAMULT_EXTRAS=test
source launch/setup_env.sh

# Three workers, however many cores: a test's launch has up to eight ranks, and a third of the time tests wait.
workers=(-n 3 --no-loadscope-reorder)
case "$*" in
    "") set -- "${workers[@]}" ;;
    --fast) set -- "${workers[@]}" --fast -r fE ;; # what it skips is counted, not listed
esac
python -m pytest --durations=10 "$@"
