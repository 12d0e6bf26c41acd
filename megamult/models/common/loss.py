"""Cross entropy, and log-sum-exp for z-loss, over a vocabulary that is sharded over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Number of logits that are processed in fp32 at a time, in up to two tensors. On a CPU these tensors fit into the
cache; on a GPU they take at most 256 MiB."""


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy and log-sum-exp of each token, both [seq, batch], in fp32 and nats.

    Forward takes two all-reduces. The first sends one number per token, the maximum of the logits. The second sends two
    numbers per token, the sum of exponentials and the logit of the label. Logits of padding (ids from `vocab_size` on)
    count as -inf and get gradient 0.

    All arithmetic is in fp32, on one chunk of tokens at a time. Forward saves the logits for backward in their own
    dtype, and backward computes the softmax again. If the logits are bf16, no fp32 tensor of their size is ever stored.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Return cross entropy and log-sum-exp, both [seq, batch].

        Args:
            ctx: torch's context.
            logits: [seq, batch, padded vocabulary/tp] logits of this rank's part of the vocabulary.
            labels: [seq, batch] ids in the whole vocabulary.
            vocab_size: exact number of tokens, without padding.
            group: the tensor-parallel group.
        """
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
        """Return the gradient of the logits.

        The derivative of the cross entropy is softmax - onehot(label); that of log-sum-exp is softmax.
        """
        logits, maximum, sums, target, elsewhere = ctx.saved_tensors
        grad = torch.empty_like(logits)
        rows = grad.view(-1, grad.shape[-1])
        of_exponential = ((grad_entropy + grad_log_sum_exp) / sums).reshape(-1, 1)
        at_target = -grad_entropy.masked_fill(elsewhere, 0.0).reshape(-1, 1)
        target = target.reshape(-1, 1)
        for at in _chunks(logits):
            # A gradient in fp32 is computed where it is returned.
            place = rows[at] if grad.dtype == torch.float32 else None
            chunk = _exponentials(logits, at, ctx.real, maximum, place)
            # Subtract 1 at the label before rounding to the logits' dtype. A softmax p near 1 would
            # round to 1, and the difference p - 1 would be lost.
            chunk.mul_(of_exponential[at]).scatter_add_(-1, target[at], at_target[at])
            if place is None:
                rows[at] = chunk
            del chunk  # before the next one is made
        return grad, None, None, None


def weighted(entropy: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over samples of weight x mean cross entropy, in float64.

    Args:
        entropy: [seq, batch] cross entropies of tokens.
        weights: [batch] weights of samples. A sample of weight 0 does not count, even if its cross entropy is not
            finite.
    """
    means = entropy.double().mean(0)
    return torch.where(weights > 0, weights * means, 0.0).sum()


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield consecutive ranges of tokens. If one token has more than CHUNK_ELEMENTS logits, a range is one
    token; otherwise a range has at most CHUNK_ELEMENTS logits."""
    tokens, local = logits.shape[:-1].numel(), logits.shape[-1]
    size = max(1, CHUNK_ELEMENTS[logits.device.type] // local)
    return (slice(first, first + size) for first in range(0, tokens, size))


def _scores(logits: Tensor, at: slice, real: int) -> Tensor:
    """Return a chunk's logits in fp32, [tokens, padded vocabulary/tp]; -inf in columns of padding, from `real` on."""
    scores = logits.view(-1, logits.shape[-1])[at]
    if real < scores.shape[-1]:
        scores = scores.to(torch.float32, copy=True)
        scores[:, real:] = -torch.inf
    return scores.float()


def _exponentials(logits: Tensor, at: slice, real: int, maximum: Tensor, out: Tensor | None = None) -> Tensor:
    """Return exp(logit - maximum) of a chunk of tokens, [tokens, padded vocabulary/tp] in fp32, in `out` if given."""
    return torch.sub(_scores(logits, at, real), maximum.view(-1, 1)[at], out=out).exp_()
