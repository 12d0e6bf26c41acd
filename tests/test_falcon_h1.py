"""The main promise for Falcon-H1: attention and mixers train the same model in every layout (fp32, 2 steps)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.invariance import Case, Outcome, covering, name_of, train
from tests.test_muon_invariance import RELATIVE, bound

STEPS = 2
RUNS: list[dict[str, Any]] = [
    {"model": "falcon_h1", "optimizer": "adamw", "placement": "all", "knobs": "shared"},
    {"model": "falcon_h1", "optimizer": "muon", "placement": "scalar", "tied": True},
    {"model": "hybrid", "optimizer": "adamw", "placement": "symmetry_free"},
    {"model": "hybrid", "optimizer": "adamw", "placement": "scalar"},
    {"model": "hybrid", "optimizer": "muon", "placement": "all", "knobs": "qk_clip"},
]
"""What is trained. Each run has its reference, so they are few, and settings that belong to no layout go together."""
CANDIDATES = [
    case
    for run, tensor, sequence, zero, accumulation, implementation in itertools.product(
        RUNS, (1, 2), (False, True), (0, 1, 3), (1, 3), ("layer", "folded")
    )
    if (
        case := Case(
            world=2 if zero else tensor,  # two data-parallel ranks where ZeRO has something to share
            tensor=tensor,
            sequence=sequence,
            zero=zero,
            accumulation=accumulation,
            recompute=accumulation == 3,
            implementation=implementation,
            steps=STEPS,
            **run,
        )
    ).valid
    and case != case.reference
]
SHARED, TIED, FREE, SCALAR, CLIPPED = RUNS
CASES = [
    *covering(CANDIDATES, ("tensor", "sequence", "zero", "accumulation", "implementation", "placement")),
    # Four processes on few cores take long, so there are only those that two cannot replace: data parallel with tensor
    # parallel, and groups of heads that are cut, whose B and C, or whose inner norm, are of several ranks.
    Case(world=4, tensor=2, sequence=True, zero=3, steps=STEPS, **TIED),
    Case(world=4, tensor=2, zero=2, implementation="folded", steps=STEPS, **FREE),
    Case(world=4, tensor=4, zero=1, implementation="folded", steps=STEPS, **SHARED),
    Case(world=4, tensor=4, sequence=True, zero=0, recompute=True, steps=STEPS, **CLIPPED),
]


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


@pytest.mark.parametrize("case", [case for case in CASES if case.knobs == "qk_clip"], ids=_name)
def test_heads_of_nested_attention_are_clipped(case: Case, outcomes: dict[Case, Outcome]) -> None:
    heads = [record["qk_clip_heads"] for record in outcomes[case].records]
    assert 0 < min(heads) < 2 * 12, "in some step some of 12 heads in two layers, and not all"
    assert heads == [record["qk_clip_heads"] for record in outcomes[case.reference].records]


def test_shared_columns_of_the_input_projection_stay_those_of_one_vector(outcomes: dict[Case, Outcome]) -> None:
    shared = {case: outcome.tensors for case, outcome in outcomes.items() if case.knobs == "shared"}
    assert {case.implementation for case in shared} == {"layer", "folded"}
    for case, tensors in shared.items():
        first, *others = (
            tensors[f"decoder.layers.0.self_attention.mixer.in_proj.{name}.col_multiplier"]
            for name in ("z", "x", "b", "c", "dt")
        )
        assert (first - 1).abs().max() > 1e-3, "the columns are trained"
        for other in others:
            # Copies of a layer may get sums over ranks in another order each.
            torch.testing.assert_close(other, first, rtol=1e-6, atol=0, msg=_name(case))


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
