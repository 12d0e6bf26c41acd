"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _run(*command: str, **variables: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_loop_learns_its_one_batch() -> None:
    losses = [float(value) for value in re.findall(r"cross entropy ([\d.]+)", _run(str(EXAMPLES / "own_loop.py")))]
    assert len(losses) == 10
    # One batch of 256 tokens over and over, from ln(1000) = 6.9: ten steps must show.
    assert losses[0] > 6.5 and losses[-1] < losses[0] - 1.0


def test_layer_overhead_prints_the_ratio_of_the_medians() -> None:
    sizes = ("--hidden", "64", "--ffn", "128", "--layers", "1", "--seq", "16", "--batch", "2", "--steps", "3")
    said = _run(str(EXAMPLES / "benchmarks" / "layer_overhead.py"), *sizes, "--dtype", "fp32")
    rate = {name: float(value.replace(",", "")) for name, value in re.findall(r"^(none|all) +([\d,.]+)", said, re.M)}
    (ratio,) = re.findall(r"ratio all / none: ([\d.]+)", said)
    # The table shows one decimal of some hundreds or thousands of tokens per second, the ratio four.
    assert abs(rate["all"] / rate["none"] - float(ratio)) < 1e-3


def test_muon_plan_prints_a_balanced_plan() -> None:
    said = _run(str(EXAMPLES / "benchmarks" / "muon_plan.py"), "--data", "8", "--stages", "1")
    rows = [line.split() for line in said.splitlines() if line.startswith(("8B", "70B"))]
    assert [(row[0], row[2]) for row in rows] == [("8B", "64"), ("70B", "64")]
    assert all(1.0 <= float(row[5]) <= float(row[4]) < 1.05 for row in rows)


def test_muon_step_counts_what_newton_schulz_costs() -> None:
    sizes = ("--hidden", "128", "--ffn", "192", "--layers", "2", "--steps", "2")
    # Compiling DeepSpeed's Newton-Schulz would take most of a minute, and is not what this shows.
    said = _run(str(EXAMPLES / "benchmarks" / "muon_step.py"), *sizes, TORCHDYNAMO_DISABLE="1")
    rows = {line[:20].strip(): line[20:].split() for line in said.splitlines() if "Muon" in line or "DeepSpeed" in line}
    ours = next(line.split() for line in said.splitlines() if line.startswith("megamult"))
    # Two layers of q, k, v, out (128 x 128) and gate, up, down (128 x 192): a multiply-add counts 2, five steps.
    dense = 2 * 5 * (4 * 3 * 2 * 128**3 + 3 * (4 * 128**2 * 192 + 2 * 128**3)) / 1e9
    assert 0.75 * dense < float(ours[5]) < dense, "symmetric products must save something"
    assert float(rows["torch.optim.Muon"][4]) > 0
