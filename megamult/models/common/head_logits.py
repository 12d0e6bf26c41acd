"""Largest attention logit of each head, in one forward pass or over all micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megamult.distributed import device
from megamult.models.common.attention import SdpaAttention, added

_SCORES = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Largest number of attention logits that are computed at a time, by type of device. The logits of one query position
are always computed together, even if they are more than that."""


class HeadLogits:
    """Largest attention logit of each query head, over all training forward passes since the last call of :meth:`take`.

    The measurement is in the forward pass, and autograd does not record it. Evaluations are not measured. A layer that
    recomputes its activations is measured once, in the recomputation.

    Args:
        model: a model whose attention is Megatron's SelfAttention with
            :class:`~megamult.models.common.attention.SdpaAttention`.

    Attributes:
        modules: names of the modules whose weights store Q and K, one for each attention layer.
        heads: number of query heads of an attention layer, on all tensor-parallel ranks together.

    Raises:
        ValueError: the model has no such attention.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SelfAttention) and isinstance(module.core_attention, SdpaAttention)
        }
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no SelfAttention with SdpaAttention, the only attention whose logits can "
                "be measured: leave multipliers.qk_clip out, or build the layers with megamult.gpt_layer_spec"
            )
        self.modules = [f"{name}.linear_qkv" for name in found]
        first: Any = next(iter(found.values()))
        self.heads: int = first.config.num_attention_heads
        self._largest = torch.full((len(found), self.heads), -torch.inf, device=device.local_device())
        for row, module in zip(self._largest, found.values(), strict=True):
            module.core_attention.register_forward_pre_hook(self._hook(row, module))

    def _hook(self, row: Tensor, attention: Any) -> Callable[..., None]:
        # Tensor-parallel ranks have equal numbers of heads, in the order of their ranks, even if a query group is
        # divided between ranks.
        group = attention.pg_collection.tp
        count = self.heads // group.size()
        local = row[group.rank() * count : (group.rank() + 1) * count]

        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            # The first pass of a layer that recomputes runs without gradients, like evaluations.
            if module.training and torch.is_grad_enabled():
                scale: Any = module.softmax_scale
                logits = largest_attention_logits(args[0].detach(), args[1].detach(), scale, mask_of(args))
                torch.maximum(local, logits, out=local)

        return hook

    def take(self) -> Tensor:
        """Return the largest logits, [attention layers, heads] in fp32, and forget them.

        The value is -inf for heads of other tensor-parallel ranks, and for all heads if there was no training forward
        pass since the last call.
        """
        taken = self._largest.clone()
        self._largest.fill_(-torch.inf)
        return taken


@torch.no_grad()
def largest_attention_logits(
    query: Tensor, key: Tensor, softmax_scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the largest q.k * scale of each head over all queries and the keys that each may attend to.

    Args:
        query: [seq, batch, heads, dim] queries, after rotary embedding.
        key: [seq, batch, groups, dim] keys.
        softmax_scale: factor of the logits, which must be positive; 1 / sqrt(dim) if None.
        mask: [batch, 1, query, key] 0 where a query may attend to a key, and -inf elsewhere; None: a query may attend
            to all keys up to its own.

    Returns:
        [heads] in fp32.
    """
    heads, dim = query.shape[2:]
    largest = torch.full((heads,), -torch.inf, device=query.device)
    for scores, forbidden in products(query, key, mask):
        scores[..., -forbidden.shape[-1] :].masked_fill_(forbidden, -torch.inf)
        largest = torch.maximum(largest, scores.view(*scores.shape[:2], -1).amax(-1).amax(0).float())
    return largest * (dim**-0.5 if softmax_scale is None else softmax_scale)


def mask_of(args: tuple[Any, ...]) -> Tensor | None:
    """Return the attention mask among the arguments of :class:`~megamult.models.common.attention.SdpaAttention`."""
    return added(args[3]) if len(args) > 3 else None


def products(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the products q.k, for some query positions at a time, in the dtype of the queries.

    Args:
        query, key, mask: the same as for :func:`largest_attention_logits`.

    Yields:
        (products, forbidden) for a few consecutive positions. `products` is [batch, heads, positions, keys], where the
        keys are those from the first token to the last of these positions. `forbidden` is True where a query must not
        attend to a key. With a mask, it is [batch, 1, positions, keys]. Without one, it is [positions, positions] for
        the last keys, those at the positions of the queries, and a query may attend to all earlier keys.
    """
    seq, batch, heads, dim = query.shape
    groups = key.shape[2]
    keys = key.permute(1, 2, 3, 0).reshape(batch * groups, dim, seq)
    queries = query.permute(1, 2, 0, 3)
    step = max(1, _SCORES[query.device.type] // (batch * heads * seq))
    for first in range(0, seq, step):
        last = min(seq, first + step)
        rows = queries[:, :, first:last].reshape(batch * groups, heads // groups * (last - first), dim)
        if mask is None:
            forbidden = torch.ones(last - first, last - first, dtype=torch.bool, device=query.device).triu(1)
        else:
            forbidden = mask[:, :, first:last, :last] != 0
        yield (rows @ keys[:, :, :last]).view(batch, heads, last - first, last), forbidden
