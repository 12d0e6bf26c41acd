#!/usr/bin/env bash
# Everything that one GPU can tell in 9 minutes, as one Markdown table that grows with every measurement:
#
#     examples/benchmarks/gpu.sh [--output FILE] [--parts NAME ...] [--toy]
#     examples/benchmarks/gpu.sh --wheels     # what must be installed beside torch and what it brings
#
# The exit code is 1 if a part failed. The parts and their limits are in gpu.py. Nothing is installed or fetched.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd -- "$root"
# In this process' place, so that a signal to gpu.sh reaches it.
exec "${PYTHON:-python3}" examples/benchmarks/gpu.py "$@"
