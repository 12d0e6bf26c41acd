"""The arithmetic behind the default ZeRO stage (examples/benchmarks/zero_stages.py) against counted collectives."""

from __future__ import annotations

import pytest

from megamult.distributed.config import ParallelConfig
from tests.processes import run_distributed
from tests.train.traffic_workers import benchmark, counts

RANKS, MICRO_BATCHES = 2, 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_sends_and_keeps_what_the_arithmetic_says(stage: int) -> None:
    zero_stages = benchmark()
    counted, other = run_distributed(RANKS, counts, stage, MICRO_BATCHES)
    assert counted["whole"] == other["whole"] and counted["calls"] == other["calls"]
    whole, expected = counted["whole"], zero_stages.whole_bytes(stage, MICRO_BATCHES)
    for kind, size in expected.items():
        # Padding of flat buffers and norms of a few bytes; ZeRO 3 gathers the head once for forward and backward, which
        # is a tenth of this model.
        least = 0.85 if (stage, kind) == (3, "allgather") else 0.99
        assert least * size < whole[kind] < 1.01 * size, (kind, whole)
    assert sum(size for kind, size in whole.items() if kind not in expected) < 0.01
    # Between steps: ZeRO 1 keeps its gradient buffers and ZeRO 3 its share of them, and ZeRO 2 frees them.
    kept = zero_stages.kept_bytes(stage, RANKS)
    fp32 = kept["masters and moments"] + (0 if stage == 2 else kept["gradients"])
    # ZeRO 3 keeps some small buffers in fp32 besides.
    assert fp32 * 0.99 < counted["kept"]["float32"] < fp32 * (1.1 if stage == 3 else 1.01), counted["kept"]
    assert counted["kept"]["bfloat16"] == pytest.approx(kept["parameters"], rel=0.01)


def test_the_default_stage_is_the_one_that_fits_and_waits_less_for_long_micro_batches() -> None:
    """Llama-3 8B over 64 ranks, in micro-batches of 16,384 tokens."""
    zero_stages = benchmark()
    arguments = zero_stages.parser().parse_args(["--tokens", "65536"])
    size, default = zero_stages.PARAMETERS["8B"], ParallelConfig().zero_stage
    assert zero_stages.waiting(default, size, 4, 64, arguments) < zero_stages.waiting(1, size, 4, 64, arguments) / 2
    assert sum(zero_stages.kept_bytes(default, 64).values()) < sum(zero_stages.kept_bytes(1, 64).values()) / 2
