#!/usr/bin/env bash
# Every test of this folder, also those that take minutes, as root, and a report of what they showed:
#
#     tests/cluster/run_all.sh [--no_container] [pytest's arguments]
#
# Installs what it needs (tests/cluster/install.sh, and the Python packages of launch/test.sh). Writes
# tests/cluster/report.md. Exit code 1 if anything failed.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
container=yes
if [[ "${1:-}" == --no_container ]]; then
    container=no
    shift
fi
tests/cluster/install.sh --all
export MEGAMULT_EXTRAS=test
source launch/setup_env.sh

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0
python -m pytest --cluster --junit-xml="$work/tests.xml" -o junit_logging=system-out tests/cluster tests/launch "$@" || failed=1
echo "not run" >"$work/container"
if [[ "$container" == yes ]]; then
    tests/cluster/container.sh --gpu | tee "$work/container" || failed=1
fi
python tests/cluster/report.py "$work/tests.xml" "$work/container" >"$work/report.md"
mv "$work/report.md" tests/cluster/report.md
exit "$failed"
