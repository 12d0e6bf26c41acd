"""The arithmetic that gradients are summed in over data-parallel ranks, in bf16 through our DeepSpeed configuration."""

from __future__ import annotations

import pytest

from tests.processes import run_distributed
from tests.train.gradient_workers import MICRO_BATCHES, reduction_errors

STAGES = [1, 2, 3]


@pytest.fixture(scope="module", params=[8, 3], ids=["8 ranks", "3 ranks"])
def errors(request: pytest.FixtureRequest) -> tuple[int, dict[int, float]]:
    """Number of ranks, and the largest error on any of them, by stage."""
    by_rank = run_distributed(request.param, reduction_errors, STAGES)
    return request.param, {stage: max(each[stage] for each in by_rank) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_gets_the_fp32_mean_of_the_gradients(errors: tuple[int, dict[int, float]], stage: int) -> None:
    """With three ranks the division is not exact either: it must not come before the cast to fp32."""
    ranks, by_stage = errors
    # An fp32 sum of n terms is off by at most (n - 1) roundings of 2^-24 of the sum of magnitudes, in whatever order;
    # two more are for the division and its reciprocal. One rounding to bf16 is 2^-9.
    assert by_stage[stage] <= (ranks * MICRO_BATCHES + 1) * 2**-24


def test_a_user_may_choose_to_sum_in_bf16() -> None:
    errors = run_distributed(2, reduction_errors, [2], {"communication_data_type": "bf16"})
    # A sum of two bf16 numbers is rounded to 8 bits: by up to 2^-9 of it, and much less cannot be among thousands.
    assert 2**-11 < max(by_stage[2] for by_stage in errors) < 2**-7
