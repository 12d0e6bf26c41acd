"""Our optimizers in two phases under every ZeRO stage: norms, clipping, and steps that must not happen."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from tests.optim.workers import StepCase, one_process, run_cases
from tests.processes import run_distributed

_two_ranks = functools.partial(StepCase, world=2)
TWO = [  # data parallel: every stage in both dtypes; tensor parallel: every stage, each dtype twice
    *(_two_ranks(zero=stage, poison="gradient" if stage else "objective") for stage in range(4)),
    *(_two_ranks(zero=stage, dtype="bf16") for stage in range(4)),
    *(_two_ranks(tensor=2, zero=stage, dtype=("fp32", "bf16")[stage % 2], poison="gradient") for stage in range(4)),
    _two_ranks(tensor=2, sequence=True, zero=1),
    *(_two_ranks(zero=stage, dtype=("fp32", "bf16")[stage % 2], optimizer="muon") for stage in range(4)),
    *(_two_ranks(tensor=2, zero=stage, dtype=("bf16", "fp32")[stage % 2], optimizer="muon") for stage in range(4)),
    _two_ranks(zero=2, optimizer="muon", poison="gradient"),
]
ONE = [StepCase(), StepCase(zero=1), StepCase(dtype="bf16"), StepCase(optimizer="muon")]


def _name(case: StepCase) -> str:
    split = f"tp{case.tensor}{'-sp' if case.sequence else ''}"
    return f"{case.optimizer}-{split}-zero{case.zero}-{case.dtype}-{case.poison}"


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    (result,) = run_distributed(1, one_process, ONE)
    return result


@pytest.fixture(scope="module")
def two() -> dict[StepCase, list[dict[str, Any]]]:
    """StepCase -> what each of two ranks saw."""
    ranks = run_distributed(2, run_cases, TWO)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(TWO)}


def test_norms_in_one_process_are_those_of_autograd_with_multipliers_apart(one: dict[str, Any]) -> None:
    main, multipliers = one["autograd norms"]
    assert main > 0.25 and multipliers > 0
    for outcome in one["cases"][:2]:
        # The same products in the same order; the sums of squares in another: fp32 rounding.
        assert outcome["norms"].main == pytest.approx(main, rel=1e-5)
        assert outcome["norms"].multipliers == pytest.approx(multipliers, rel=1e-5)


@pytest.mark.parametrize("case", TWO, ids=_name)
def test_norms_count_each_element_once_whatever_the_layout(
    one: dict[str, Any], two: dict[StepCase, list[dict[str, Any]]], case: StepCase
) -> None:
    main, multipliers = one["autograd norms"]
    # fp32: sums in another order. bf16: gradients rounded to 8 bits, random over thousands of elements; a replica
    # that counted twice would be far off (its part of the norm times 1.41).
    tolerance = 1e-5 if case.dtype == "fp32" else 1e-2
    for rank in two[case]:
        assert rank["norms"].main == pytest.approx(main, rel=tolerance)
        assert rank["norms"].multipliers == pytest.approx(multipliers, rel=tolerance)


@pytest.mark.parametrize("case", TWO, ids=_name)
def test_a_step_with_a_bad_gradient_on_one_rank_is_skipped_on_every_rank(
    two: dict[StepCase, list[dict[str, Any]]], case: StepCase
) -> None:
    for rank in two[case]:
        assert rank["moved"], "the step before must change something, or nothing is shown"
        assert not rank["bad norms finite"]
        assert rank["unchanged"], "masters or weights are not bitwise what they were"
        assert rank["skipped"] == 1
        assert rank["counts after one step"] == {1.0}
        assert rank["counts after the bad step"] == {1.0}


@pytest.mark.parametrize("case", TWO, ids=_name)
def test_the_step_after_a_skipped_one_is_bitwise_what_it_would_have_been(
    two: dict[StepCase, list[dict[str, Any]]], case: StepCase
) -> None:
    for rank in two[case]:
        assert rank["fresh again"], "two engines of one seed start differently: the comparison would show nothing"
        assert rank["as if it had not been"]
        assert rank["counts at the end"] == {2.0}
        assert rank["skipped at the end"] == 1


def test_a_bad_gradient_in_one_process_is_skipped_too(one: dict[str, Any]) -> None:
    for outcome in one["cases"]:
        assert outcome["unchanged"] and outcome["as if it had not been"] and outcome["skipped"] == 1


def test_deepspeeds_phantom_step_at_zero_0_in_bf16_leaves_no_trace(one: dict[str, Any]) -> None:
    unfused = one["unfused"]
    assert unfused["class"] == "FP16_UnfusedOptimizer", "the class whose constructor calls step()"
    assert unfused["masters"] == unfused["parameters"] > 0
    assert unfused["equal"], "weight decay was applied at construction"
    outcome = one["cases"][ONE.index(StepCase(dtype="bf16"))]
    assert outcome["counts when fresh"] <= {0.0}
    assert outcome["counts after one step"] == {1.0}


@pytest.mark.parametrize("clip_multipliers", [False, True, "joint"])
def test_two_phases_are_torchs_adamw_after_clip_grad_norm(one: dict[str, Any], clip_multipliers: Any) -> None:
    differences = one["against torch"][clip_multipliers]
    assert len(differences) == 6
    # Both fp32, torch's fused kernel against its plain one: a few roundings per step, 5 steps.
    assert max(differences.values()) < 2e-6, differences


def test_a_step_that_was_not_prepared_says_what_prepares_it(one: dict[str, Any]) -> None:
    assert "call megamult.attach(engine, optimizer) after deepspeed.initialize" in one["unprepared"]
    assert "in your own loop, make the optimizer from the model's parameters" in one["unprepared"]


def test_the_reported_norms_are_from_before_clipping(one: dict[str, Any]) -> None:
    # The threshold is 0.25: a norm after clipping could not exceed it.
    assert all(outcome["norms"].main > 0.25 and math.isfinite(outcome["norms"].main) for outcome in one["cases"])
