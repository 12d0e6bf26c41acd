#!/usr/bin/env bash
# Makes .venv with what the tests need, then runs tests:
#
#     launch/test.sh             every test, by three workers
#     launch/test.sh --fast      for every edit: without the tests that start processes, except one launch of two ranks
#     launch/test.sh ARGUMENTS   the tests that these pytest arguments choose, in one process
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export MEGAMULT_EXTRAS=test
source launch/setup_env.sh

# Three workers, whatever the number of cores, because one test may start eight ranks, and tests wait for a third of
# their time.
workers=(-n 3 --no-loadscope-reorder)
case "$*" in
    "") set -- "${workers[@]}" ;;
    --fast) set -- "${workers[@]}" --fast -r fE ;; # the summary counts skipped tests and does not list them
esac
python -m pytest --durations=10 "$@"
