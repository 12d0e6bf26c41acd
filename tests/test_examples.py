"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _run(*command: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_loop_learns_its_one_batch() -> None:
    losses = [float(value) for value in re.findall(r"cross entropy ([\d.]+)", _run(str(EXAMPLES / "own_loop.py")))]
    assert len(losses) == 10
    # One batch of 256 tokens over and over, from ln(1000) = 6.9: ten AdamW steps must show.
    assert losses[0] > 6.5 and losses[-1] < losses[0] - 1.0


def test_layer_overhead_prints_the_ratio_of_the_medians() -> None:
    sizes = ("--hidden", "64", "--ffn", "128", "--layers", "1", "--seq", "16", "--batch", "2", "--steps", "3")
    said = _run(str(EXAMPLES / "benchmarks" / "layer_overhead.py"), *sizes, "--dtype", "fp32")
    rate = {name: float(value.replace(",", "")) for name, value in re.findall(r"^(none|all) +([\d,.]+)", said, re.M)}
    (ratio,) = re.findall(r"ratio all / none: ([\d.]+)", said)
    # The table shows one decimal of some hundreds or thousands of tokens per second, the ratio four.
    assert abs(rate["all"] / rate["none"] - float(ratio)) < 1e-3
