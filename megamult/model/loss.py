"""Cross entropy over a vocabulary that is sharded over tensor-parallel ranks, with log-sum-exp for z-loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class VocabParallelCrossEntropy(torch.autograd.Function):
    """(cross entropy, log-sum-exp) per token, both [seq, batch], in fp32 and nats.

    Two collectives of one number per token and statistic: the maximum; then the sum of exponentials together with
    the target's logit. Logits of padding (ids from `vocab_size` on) count as -inf and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """logits: [seq, batch, padded vocabulary/tp]; labels: [seq, batch] global ids."""
        local = logits.shape[-1]
        start = group.rank() * local
        scores = logits.float()
        if start + local > vocab_size:
            if scores is logits:
                scores = scores.clone()
            scores[..., max(0, vocab_size - start) :] = -torch.inf
        maximum = scores.amax(-1)
        if group.size() > 1:
            torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=group)
        elsewhere = (labels < start) | (labels >= start + local)
        target = (labels - start).masked_fill(elsewhere, 0)
        predicted = (scores.gather(-1, target.unsqueeze(-1)).squeeze(-1) - maximum).masked_fill(elsewhere, 0.0)
        exponentials = (scores - maximum.unsqueeze(-1)).exp_()
        sums = torch.stack([exponentials.sum(-1), predicted])
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
        softmax = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(softmax.to(logits.dtype), target, elsewhere)
        log_sum = sums[0].log()
        return log_sum - sums[1], log_sum + maximum

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, grad_log_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
        """d entropy = softmax - onehot; d log-sum-exp = softmax."""
        softmax, target, elsewhere = ctx.saved_tensors
        grad = softmax * (grad_entropy + grad_log_sum_exp).to(softmax.dtype).unsqueeze(-1)
        at_target = -grad_entropy.masked_fill(elsewhere, 0.0).to(softmax.dtype)
        grad.scatter_add_(-1, target.unsqueeze(-1), at_target.unsqueeze(-1))
        return grad, None, None, None
