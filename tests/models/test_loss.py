"""Cross entropy and log-sum-exp over a sharded, padded vocabulary are torch's in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamult.models.common import loss
from megamult.models.common.loss import VocabParallelCrossEntropy
from tests.models.conftest import Ranks
from tests.models.workers import LOSS_CASES, VOCAB, loss_inputs

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
    # The result is rounded once to the logits' dtype (half its epsilon). Before that all is fp32: the exponential's
    # argument (about 20) rounds, and the softmax, the weights (of at most 3), their product and the difference.
    tolerance = (20 + 4) * 3 * 2**-24
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(got.dtype).eps / 2, atol=tolerance)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_the_gradient_of_a_confident_target_in_bf16_is_that_of_fp32_rounded(probability: float) -> None:
    """At p = 0.999 the target's gradient is -0.001: a softmax that is rounded to bf16 before the 1 is subtracted has
    lost it (bf16 has no number between 0.996 and 1)."""
    vocab = 1000
    logits = torch.zeros(4, 1, vocab)
    labels = torch.tensor([[0], [1], [500], [999]])
    logits.scatter_(-1, labels.unsqueeze(-1), math.log(probability / (1 - probability) * (vocab - 1)))
    logits = logits.bfloat16()
    exact = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten()).backward()
    found = logits.clone().requires_grad_()
    entropy, _ = VocabParallelCrossEntropy.apply(found, labels, vocab, OneRank())
    entropy.mean().backward()
    # Half of bf16's epsilon is the one rounding at the end; 0.1 % is what fp32 may lose of 1 - p before it.
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=2**-8 + 1e-3, atol=0)


def test_nothing_of_the_size_of_bf16_logits_is_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = 512, 384
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 16 * vocab)
    logits = torch.randn(tokens, 1, vocab, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (tokens, 1), generator=torch.Generator().manual_seed(2))
    with LiveFp32() as live:
        entropy, log_sum_exp = VocabParallelCrossEntropy.apply(logits, labels, 300, OneRank())
        (entropy.sum() + log_sum_exp.square().sum()).backward()
    # Two chunks, and some twenty numbers of every token.
    assert 16 * vocab <= live.most <= 2 * 16 * vocab + 20 * tokens


def test_a_label_in_the_padding_is_an_infinite_loss_and_not_a_wrong_one() -> None:
    logits, labels = torch.zeros(2, 1, 384), torch.tensor([[310], [5]])
    entropy, _ = VocabParallelCrossEntropy.apply(logits, labels, 300, OneRank())
    assert entropy[0, 0] == torch.inf and entropy[1, 0] == pytest.approx(math.log(300), rel=1e-6)


class OneRank:
    """A process group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class LiveFp32(TorchDispatchMode):
    """Notes how many elements fp32 tensors, made while it is entered, have held at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                storage = each.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // 4
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        self.most = max(self.most, sum(elements for _, elements in self._storages.values()))
        return result


@every_size
def test_the_logits_are_left_as_they_were(ranks: Ranks, tensor: int) -> None:
    assert all(outcome[case]["untouched"] for outcome in ranks(tensor, "loss") for case in LOSS_CASES)
