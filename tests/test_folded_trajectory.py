"""Folded multipliers train as the layers' do: 20 steps, losses, weights and multipliers (fp32, one process)."""

from __future__ import annotations

import pytest
import torch

from tests.invariance import Case, Outcome, train
from tests.test_muon_invariance import bound

CASES = [
    Case(placement=placement, optimizer=optimizer, implementation="folded", steps=20)
    for placement in ("all", "symmetry_free", "scalar")
    for optimizer in ("adamw", "muon")
]
# The same sums in another order (the chain rule on the accumulated gradient instead of in the layers): 1e-7, which
# twenty steps of AdamW do not amplify beyond this.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return train(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.placement}-{case.optimizer}")
def test_losses_are_those_of_the_layers(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected = [record["loss"] for record in outcomes[case.reference].records]
    assert len(expected) == 20 and expected[-1] < 0.8 * expected[0]
    assert [record["loss"] for record in outcomes[case].records] == pytest.approx(expected, rel=RELATIVE, abs=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.placement}-{case.optimizer}")
def test_weights_and_multipliers_are_those_of_the_layers_under_the_same_names(
    case: Case, outcomes: dict[Case, Outcome]
) -> None:
    expected, actual = outcomes[case.reference], outcomes[case]
    assert sorted(actual.tensors) == sorted(expected.tensors)
    assert set(actual.kinds.values()) == {"matrix", "multiplier", "undecayed", "embedding", "head"}
    assert actual.kinds == expected.kinds
    for name, reference in expected.tensors.items():
        allowed = RELATIVE * float(torch.linalg.vector_norm(reference))
        if case.optimizer == "muon":
            allowed = bound(expected.kinds[name] == "matrix", reference, case.steps)
        assert float(torch.linalg.vector_norm(actual.tensors[name] - reference)) <= allowed, name
