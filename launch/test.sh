#!/usr/bin/env bash
# Makes .venv with what the tests need, then runs every test, or those that the arguments choose:
#
#     launch/test.sh [pytest's arguments]
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export MEGAMULT_EXTRAS=test
source launch/setup_env.sh

python -m pytest --durations=10 "$@"
