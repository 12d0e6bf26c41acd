"""Work of the processes of test_zero_traffic.py: the benchmark that counts what a ZeRO stage sends and keeps."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "zero_stages.py"


def benchmark() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("zero_stages", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zero_stages"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def counts(stage: int, accumulation: int) -> dict[str, Any]:
    """Count what one optimizer step of a small bf16 model sends and keeps, in bytes per parameter."""
    from megamult.distributed import start

    arguments = argparse.Namespace(hidden=128, layers=4, accumulation=accumulation, bucket=200_000)
    return vars(benchmark().count(stage, arguments, start.initialize(1)))
