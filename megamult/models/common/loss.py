"""Cross entropy over a vocabulary that is sharded over tensor-parallel ranks, with log-sum-exp for z-loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits that are processed in fp32 at a time, in up to two tensors: these fit a CPU's cache, and take at most
256 MiB of a GPU."""


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy and log-sum-exp per token, both [seq, batch], in fp32 and nats.

    Two collectives send one number per token and statistic: the maximum; then the sum of exponentials together with
    the target's logit. Logits of padding (ids from `vocab_size` on) count as -inf and get no gradient.

    All arithmetic is in fp32, on a chunk of tokens at a time: the logits are kept for backward in their own dtype, and
    the softmax is computed again there, so in bf16 no tensor of the logits' size is held in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Return both. logits: [seq, batch, padded vocabulary/tp]; labels: [seq, batch] global ids."""
        logits = logits.contiguous()
        local = logits.shape[-1]
        start = group.rank() * local
        real = min(max(vocab_size - start, 0), local)
        maximum = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        for at in _chunks(logits):
            maximum.view(-1)[at] = _scores(logits, at, real).amax(-1)
        if group.size() > 1:
            torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=group)
        elsewhere = (labels < start) | (labels >= start + local)
        target = (labels - start).masked_fill(elsewhere, 0)
        chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).float().masked_fill(target >= real, -torch.inf)
        sums = torch.empty(2, *labels.shape, dtype=torch.float32, device=logits.device)
        sums[1] = (chosen - maximum).masked_fill(elsewhere, 0.0)
        for at in _chunks(logits):
            sums[0].view(-1)[at] = _exponentials(logits, at, real, maximum).sum(-1)
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
        ctx.save_for_backward(logits, maximum, sums[0], target, elsewhere)
        ctx.real = real
        log_sum = sums[0].log()
        return log_sum - sums[1], log_sum + maximum

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, grad_log_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
        """Return the logits' gradient: d entropy = softmax - onehot; d log-sum-exp = softmax."""
        logits, maximum, sums, target, elsewhere = ctx.saved_tensors
        grad = torch.empty_like(logits)
        rows = grad.view(-1, grad.shape[-1])
        of_softmax = (grad_entropy + grad_log_sum_exp).reshape(-1, 1)
        at_target = -grad_entropy.masked_fill(elsewhere, 0.0).reshape(-1, 1)
        target = target.reshape(-1, 1)
        for at in _chunks(logits):
            softmax = _exponentials(logits, at, ctx.real, maximum).div_(sums.view(-1, 1)[at])
            # The target's 1 is subtracted before rounding: near p = 1, p rounds to 1 and the difference would be lost.
            rows[at] = softmax.mul_(of_softmax[at]).scatter_add_(-1, target[at], at_target[at])
            del softmax  # before the next chunk is made
        return grad, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of tokens, each with at most CHUNK_ELEMENTS logits or of one token."""
    tokens, local = logits.shape[:-1].numel(), logits.shape[-1]
    size = max(1, CHUNK_ELEMENTS[logits.device.type] // local)
    return (slice(first, first + size) for first in range(0, tokens, size))


def _scores(logits: Tensor, at: slice, real: int) -> Tensor:
    """Return a chunk's logits in fp32, [tokens, padded vocabulary/tp]; those from `real` on are padding and -inf."""
    scores = logits.view(-1, logits.shape[-1])[at]
    if real < scores.shape[-1]:
        scores = scores.to(torch.float32, copy=True)
        scores[:, real:] = -torch.inf
    return scores.float()


def _exponentials(logits: Tensor, at: slice, real: int, maximum: Tensor) -> Tensor:
    """Return exp(score - maximum) of a chunk of tokens, [tokens, padded vocabulary/tp], in new memory."""
    return (_scores(logits, at, real) - maximum.view(-1, 1)[at]).exp_()
