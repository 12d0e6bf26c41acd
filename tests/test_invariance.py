"""The main promise: losses, gradient norms and full parameters do not depend on the layout (fp32, 5 steps)."""

from __future__ import annotations

import pytest
import torch

from tests.invariance import Case, Outcome, name_of, pairwise_cases, train

# fp32 sums in another order differ by some 1e-7 relative (2^-24 times the root of the terms); five updates of a
# model of this depth amplify that, and stay below 1e-5. What a wrong layout does is above 1e-3.
RELATIVE = 1e-5

CASES = pairwise_cases()


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return train(CASES)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("key", ["loss", "grad_norm", "multiplier_grad_norm"])
def test_every_step_is_that_of_one_process(case: Case, key: str, outcomes: dict[Case, Outcome]) -> None:
    expected = [record[key] for record in outcomes[case.reference].records]
    actual = [record[key] for record in outcomes[case].records]
    assert actual == pytest.approx(expected, rel=RELATIVE, abs=0.0)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_full_parameter_is_that_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected, actual = outcomes[case.reference].tensors, outcomes[case].tensors
    assert sorted(actual) == sorted(expected)
    for name, reference in expected.items():
        difference = torch.linalg.vector_norm(actual[name] - reference)
        assert difference <= RELATIVE * torch.linalg.vector_norm(reference), name


def test_the_training_moves_every_tensor(outcomes: dict[Case, Outcome]) -> None:
    """Else agreement would prove nothing: an update of lr 3e-3 is far above the tolerance on every tensor."""
    for outcome in outcomes.values():
        for name, tensor in outcome.tensors.items():
            moved = torch.linalg.vector_norm(tensor - outcome.initial[name])
            assert moved > 10 * RELATIVE * torch.linalg.vector_norm(tensor), name
