"""The main promise with DistributedMuon: losses and full parameters do not depend on the layout.

fp32 with exchange and Newton-Schulz in fp32: tight. bf16 with both in bf16: within its rounding.
"""

from __future__ import annotations

import math

import pytest
import torch

from megamult.optim.muon.newton_schulz import scale
from tests.invariance import LR, Case, Outcome, name_of, pairwise_cases, train

CASES = [
    *pairwise_cases(
        ("world", "tensor", "sequence", "zero", "accumulation", "implementation"), optimizer="muon", steps=5
    ),
    # Where ZeRO's cuts, straddling matrices and the joining of tensor-parallel shards meet.
    Case(world=4, tensor=2, sequence=True, zero=3, accumulation=3, sub_group_size=10_000, optimizer="muon", steps=5),
]
LONG = [
    Case(world=2, zero=1, optimizer="muon", steps=20),
    Case(world=2, tensor=2, sequence=True, zero=0, implementation="folded", optimizer="muon", steps=20),
    Case(world=2, zero=3, accumulation=3, implementation="folded", optimizer="muon", steps=20),
    Case(world=4, tensor=2, zero=2, optimizer="muon", steps=20),
    Case(world=4, tensor=4, zero=1, optimizer="muon", steps=20),
]
BF16 = [
    Case(world=2, zero=2, accumulation=3, optimizer="muon", dtype="bf16"),
    Case(world=2, tensor=2, sequence=True, zero=1, optimizer="muon", dtype="bf16"),
    Case(world=2, tensor=2, zero=3, implementation="folded", optimizer="muon", dtype="bf16"),
    Case(world=2, zero=0, optimizer="muon", dtype="bf16"),
]

NORMUON = [
    Case(zero=0, accumulation=3, optimizer="normuon"),
    Case(world=2, tensor=2, sequence=True, zero=0, optimizer="normuon"),
    Case(world=2, zero=1, implementation="folded", optimizer="normuon"),
    Case(world=2, zero=3, accumulation=3, optimizer="normuon"),
    Case(world=4, tensor=2, zero=2, accumulation=3, optimizer="normuon"),
    Case(world=4, tensor=4, zero=1, optimizer="normuon"),
]

RELATIVE = 1e-5
"""As for AdamW: fp32 sums in another order differ by some 1e-7, and few steps amplify that little."""

SLOPE = 3.4445**5
"""By how much Newton-Schulz can enlarge a difference: a small singular value grows by 3.4445 in each of five steps."""

INPUT = 6e-7
"""Relative difference of what is orthogonalized, between layouts: the gradient is a sum of some hundred terms of either
sign in another order, 2^-24 x sqrt(100) of its size."""


def bound(matrix: bool, tensor: torch.Tensor, steps: int) -> float:
    """What two layouts' full tensors may differ by in norm after `steps` steps at the rate LR, to first order.

    Newton-Schulz maps matrices of Frobenius norm 1 with a Lipschitz constant of SLOPE at most, so each update differs
    by lr x scale x SLOPE x INPUT in norm, and all of them by the sum. That earlier differences change later gradients
    is of second order and left out: few directions have the full slope, and a run uses a tenth of the bound.
    Everything else is AdamW's: as in test_invariance.py.
    """
    others = RELATIVE * float(torch.linalg.vector_norm(tensor))
    if matrix:
        return others + steps * LR * scale(*tensor.shape, "match_rms_adamw") * SLOPE * INPUT
    return steps / 5 * others


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return train([*CASES, *LONG, *BF16, *NORMUON])


@pytest.mark.parametrize("case", [*CASES, *NORMUON], ids=lambda case: f"{name_of(case)}-{case.optimizer}")
def test_the_first_losses_are_those_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    for key in ("loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in outcomes[case.reference].records[:5]]
        actual = [record[key] for record in outcomes[case].records[:5]]
        assert actual == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


@pytest.mark.parametrize("case", [*CASES, *LONG], ids=lambda case: f"{name_of(case)}-{case.steps}")
def test_every_full_parameter_is_that_of_one_process_after_5_and_after_20_steps(
    case: Case, outcomes: dict[Case, Outcome]
) -> None:
    expected, actual = outcomes[case.reference].tensors, outcomes[case].tensors
    assert sorted(actual) == sorted(expected)
    worst = 0.0
    for name, reference in expected.items():
        difference = float(torch.linalg.vector_norm(actual[name] - reference))
        worst = max(worst, difference / float(torch.linalg.vector_norm(reference)))
        assert difference <= bound(outcomes[case].kinds[name] == "matrix", reference, case.steps), name
    print(f"{name_of(case)}: largest relative difference {worst:.1e}")


@pytest.mark.parametrize("case", NORMUON, ids=name_of)
def test_normuon_leaves_every_full_parameter_as_one_process_does(case: Case, outcomes: dict[Case, Outcome]) -> None:
    """Its rows are divided by their own size, which doubles a row's difference; the smallest rows are about half as
    large as the average: 4 times Muon's bound."""
    outcome, expected = outcomes[case], outcomes[case.reference].tensors
    assert sorted(outcome.tensors) == sorted(expected)
    for name, reference in expected.items():
        limit = 4 * bound(outcome.kinds[name] == "matrix", reference, case.steps)
        assert float(torch.linalg.vector_norm(outcome.tensors[name] - reference)) <= limit, name
        moved = float(torch.linalg.vector_norm(reference - outcomes[case.reference].initial[name]))
        assert moved > 10 * limit, f"{name}: else agreement would prove nothing"


def test_a_wrong_update_would_exceed_the_bound(outcomes: dict[Case, Outcome]) -> None:
    """The bound must be far below what a step does, or agreement would prove nothing."""
    for case in {case.reference for case in [*CASES, *LONG]}:
        outcome = outcomes[case]
        for name, tensor in outcome.tensors.items():
            moved = float(torch.linalg.vector_norm(tensor - outcome.initial[name]))
            assert moved > 50 * bound(outcome.kinds[name] == "matrix", tensor, case.steps), name


@pytest.mark.parametrize("case", BF16, ids=name_of)
def test_losses_in_bf16_are_within_its_rounding(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected = [record["loss"] for record in outcomes[case.reference].records]
    actual = [record["loss"] for record in outcomes[case].records]
    gap = max(abs(a - e) / e for a, e in zip(actual, expected, strict=True))
    print(f"{name_of(case)}: largest relative gap of the loss {gap:.1e}")
    assert gap < 2**-8
    assert not math.isclose(expected[0], expected[-1], rel_tol=2**-8), "training must move the loss by more than that"
