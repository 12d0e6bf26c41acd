"""Whole training steps on fake CUDA tensors (`examples/benchmarks/fake_step.py`): devices, dtypes, and what they cost.

The numbers below are upper bounds. They are the numbers of today: a change that needs more of something says why and
raises them here and in `docs/benchmarks.md`; one that needs fewer lowers them, so that they are not lost again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import starts_processes

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler: install g++, or set CXX"
)
pytestmark = needs_compiler

IMPLEMENTATIONS, OPTIMIZERS = ("none", "layer", "folded"), ("adamw", "muon")
# Two layers, in bf16, one process: launches of a micro-batch, and of the optimizer step of AdamW and of Muon.
MICRO_BATCH = {"none": 135, "layer": 212, "folded": 135}
STEP = {"none": (25, 128), "layer": (28, 131), "folded": (89, 192)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tests/fake_steps.py` prints."""
    starts_processes()
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_steps"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def every(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """All (run, part of a step, counts)."""
    return [
        (f"{setting} {run}", part, counts)
        for setting in ("alone", "sharded", "hybrid")
        for run, parts in found[setting].items()
        for part, counts in parts.items()
    ]


def test_no_cpu_tensor_meets_a_cuda_one(found: dict[str, Any]) -> None:
    """The step itself raises where one does. Three planted ones show that: torch would forgive the index."""
    assert len(every(found)) == 2 * (6 + 2 + 1)
    planted = found["on the CPU"]
    assert planted.pop("") == "nothing"
    assert "norm.py:forward gets tensors of several devices: [128, 2, 512] on cuda:0, [512] on cpu" in planted["norm"]
    assert "embedding.py:forward gets tensors of several devices" in planted["tokens"]
    assert "aten::index.Tensor" in planted["index"] and "[128] on cpu" in planted["index"]


def test_products_are_in_bf16(found: dict[str, Any]) -> None:
    for run, part, counts in every(found):
        if run.startswith("hybrid"):
            # The states of the SSM are fp32 by design, as in the fused kernels, and small.
            allowed: tuple[str, ...] = ("bmm megamult/models/common/ssd.py:ssd", "bmm backward")
        else:
            # Folded multipliers sum gradients over rows by a product with few rows of zeros and ones, in fp32.
            allowed = ("mm megamult/multipliers/kernels.py:scale_backward",)
        assert set(counts["wide"]) <= set(allowed), (run, part)
        if part == "micro_batch" and not run.startswith("hybrid"):
            assert not counts["wide"] and counts["flops"]["bfloat16"] > 1e9, run
        if run.endswith("muon") and part == "step":
            # What is in fp32 is small beside Newton-Schulz.
            assert counts["flops"].get("float32", 0) < 0.01 * counts["flops"]["bfloat16"], run


def test_the_host_waits_for_the_device_twice_in_a_step_and_never_in_a_micro_batch(found: dict[str, Any]) -> None:
    """The norms decide on clipping and skipping, and the loss is printed with the votes of all ranks."""
    for run, part, counts in every(found):
        waits = ["read megamult/optim/reduction.py:__call__", "read megamult/train/votes.py:sums_and_votes"]
        assert counts["waits"] == (dict.fromkeys(waits, 1) if part == "step" else {}), (run, part)
        # Beside the votes nothing is computed on the host.
        assert set(counts["host"]) <= {"fill_ megamult/train/votes.py:sums_and_votes"}, (run, part, counts["host"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_launches_are_no_more_than_they_were(found: dict[str, Any], implementation: str) -> None:
    for optimizer, most in zip(OPTIMIZERS, STEP[implementation], strict=True):
        parts = found["alone"][f"{implementation} {optimizer}"]
        assert 0 < parts["micro_batch"]["launches"] <= MICRO_BATCH[implementation], parts["micro_batch"]["where"]
        assert 0 < parts["step"]["launches"] <= most, parts["step"]["where"]


def test_collectives_are_no_more_than_they_were(found: dict[str, Any]) -> None:
    """One layer, tensor parallel 2 x data parallel 4, ZeRO 0. DeepSpeed's reduction of gradients is not run."""
    for run, parts in found["alone"].items():
        assert not parts["micro_batch"]["collectives"] and not parts["step"]["collectives"], run
    for run, parts in found["sharded"].items():
        # Attention and MLP forward and backward, the embedding, the head's backward, and three in the loss.
        sent = {kind: number for kind, (number, _) in parts["micro_batch"]["collectives"].items()}
        assert sent == {"allreduce": 8}, run
        # Norms, the loss with its votes, and the sums of partial gradients: the multipliers' here.
        sent = {kind: number for kind, (number, _) in parts["step"]["collectives"].items()}
        assert sent == {"allreduce": 3, "alltoall": 2, "allgather": 1}, run


def test_multipliers_cost_what_is_known(found: dict[str, Any]) -> None:
    """Folded ones nothing in a micro-batch, and no more collectives than those in the layers in a step."""
    launches = {name: found["alone"][f"{name} adamw"]["micro_batch"]["launches"] for name in IMPLEMENTATIONS}
    assert launches["folded"] == launches["none"] < launches["layer"]
    layer, folded = (found["sharded"][f"{name} muon"]["step"]["collectives"] for name in ("layer", "folded"))
    assert {kind: number for kind, (number, _) in layer.items()} == {k: number for k, (number, _) in folded.items()}
