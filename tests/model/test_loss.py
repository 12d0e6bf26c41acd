"""Cross entropy and log-sum-exp over a sharded, padded vocabulary are torch's in float64."""

from __future__ import annotations

import pytest
import torch

from tests.model.conftest import Ranks
from tests.model.workers import LOSS_CASES, VOCAB, loss_inputs

every_case = pytest.mark.parametrize("case", LOSS_CASES)
every_size = pytest.mark.parametrize("tensor", [1, 2, 4])


def reference(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross entropy, log-sum-exp, gradient of the logits) in float64, over the real vocabulary."""
    logits, labels, of_entropy, of_log_sum_exp = loss_inputs(case)
    exact = logits.double().requires_grad_()
    real = exact[..., :VOCAB]
    entropy = torch.nn.functional.cross_entropy(real.flatten(0, 1), labels.flatten(), reduction="none")
    entropy, log_sum_exp = entropy.view(labels.shape), real.logsumexp(-1)
    (of_entropy.double() * entropy + of_log_sum_exp.double() * log_sum_exp).sum().backward()
    return entropy.detach(), log_sum_exp.detach(), exact.grad


@every_case
@every_size
def test_cross_entropy_and_log_sum_exp_are_torchs_in_float64_on_every_rank(
    ranks: Ranks, tensor: int, case: str
) -> None:
    entropy, log_sum_exp, _ = reference(case)
    for outcome in ranks(tensor, "loss"):
        found = outcome[case]
        # fp32 differences to the maximum (about 10) and the logarithm of a sum of 130: a few roundings of 2^-24 * 10.
        torch.testing.assert_close(found["entropy"].double(), entropy, rtol=0, atol=4e-6)
        # The maximum is added back: one rounding of it, 2^-24 * 300 in the case far from zero.
        torch.testing.assert_close(found["log_sum_exp"].double(), log_sum_exp, rtol=2**-23, atol=4e-6)
        assert found["entropy"].dtype == found["log_sum_exp"].dtype == torch.float32


@every_case
@every_size
def test_gradients_of_logits_are_torchs_and_exactly_zero_for_padding(ranks: Ranks, tensor: int, case: str) -> None:
    _, _, want = reference(case)
    got = torch.cat([outcome[case]["grad"] for outcome in ranks(tensor, "loss")], dim=-1)
    assert got.dtype == LOSS_CASES[case][0]
    assert got.isfinite().all()
    assert (got[..., VOCAB:] == 0).all()
    # Entries are at most about 5 in size. Softmax, the weights, their product and the target's subtraction are each
    # rounded to the logits' dtype (half its epsilon); in fp32 the exponential's argument (about 20) rounds as well.
    tolerance = 4 * 5 * torch.finfo(got.dtype).eps / 2 + 20 * 2**-24
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@every_size
def test_the_logits_are_left_as_they_were(ranks: Ranks, tensor: int) -> None:
    assert all(outcome[case]["untouched"] for outcome in ranks(tensor, "loss") for case in LOSS_CASES)
