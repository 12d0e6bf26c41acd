"""The main promise for Falcon-H1: attention and mixers train the same model in every layout (fp32, 3 steps)."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.invariance import Case, Outcome, covering, name_of, train
from tests.test_muon_invariance import RELATIVE, bound

STEPS = 3
CANDIDATES = [
    case
    for tensor, sequence, zero, accumulation, implementation, optimizer, model in itertools.product(
        (1, 2, 4), (False, True), (0, 1, 2, 3), (1, 3), ("layer", "folded"), ("adamw", "muon"), ("falcon_h1", "hybrid")
    )
    if (
        case := Case(
            # Two data-parallel ranks where ZeRO has something to share and four processes are enough.
            world=tensor * (2 if zero and tensor < 4 else 1),
            tensor=tensor,
            sequence=sequence,
            zero=zero,
            accumulation=accumulation,
            recompute=accumulation == 3,
            implementation=implementation,
            optimizer=optimizer,
            model=model,
            steps=STEPS,
        )
    ).valid
]
CASES = covering(CANDIDATES, ("tensor", "sequence", "zero", "accumulation", "implementation", "optimizer", "model"))
CLIPPED = Case(
    world=2,
    tensor=2,
    sequence=True,
    zero=1,
    recompute=True,
    model="hybrid",
    knobs="qk_clip",
    optimizer="muon",
    steps=STEPS,
)
SHARED = Case(world=2, tensor=2, implementation="folded", model="falcon_h1", knobs="shared", steps=STEPS)
"""Its reference has the column multipliers in the layers."""
CASES += [CLIPPED, SHARED]


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return train(CASES)


def _name(case: Case) -> str:
    return f"{name_of(case)}-{case.optimizer}-{case.model}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_every_step_is_that_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    for key in ("loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in outcomes[case.reference].records]
        actual = [record[key] for record in outcomes[case].records]
        assert actual == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_heads_of_nested_attention_are_clipped(outcomes: dict[Case, Outcome]) -> None:
    heads = [record["qk_clip_heads"] for record in outcomes[CLIPPED].records]
    assert 0 < min(heads) < 2 * 12, "in some step some of 12 heads in two layers, and not all"
    assert heads == [record["qk_clip_heads"] for record in outcomes[CLIPPED.reference].records]


@pytest.mark.parametrize("case", [SHARED, SHARED.reference], ids=name_of)
def test_shared_columns_of_the_input_projection_stay_those_of_one_vector(
    case: Case, outcomes: dict[Case, Outcome]
) -> None:
    tensors = outcomes[case].tensors
    first, *others = (
        tensors[f"decoder.layers.0.self_attention.mixer.in_proj.{name}.col_multiplier"]
        for name in ("z", "x", "b", "c", "dt")
    )
    assert (first - 1).abs().max() > 1e-3, "the columns are trained"
    for other in others:
        # Copies of a layer may get sums over ranks in another order each.
        torch.testing.assert_close(other, first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_every_full_parameter_is_that_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected, outcome = outcomes[case.reference].tensors, outcomes[case]
    assert sorted(outcome.tensors) == sorted(expected)
    for name, reference in expected.items():
        matrix = case.optimizer == "muon" and outcome.kinds[name] == "matrix"
        assert torch.linalg.vector_norm(outcome.tensors[name] - reference) <= bound(matrix, reference, STEPS), name


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_layouts_differ_by_little_of_what_training_moves(case: Case, outcomes: dict[Case, Outcome]) -> None:
    """Else agreement would prove nothing. Step sizes dt, whose biases are about -5, move by 4e-5 of these."""
    expected, outcome = outcomes[case.reference], outcomes[case]
    for name, reference in expected.tensors.items():
        moved = torch.linalg.vector_norm(reference - expected.initial[name])
        assert torch.linalg.vector_norm(outcome.tensors[name] - reference) <= 0.01 * moved, name
