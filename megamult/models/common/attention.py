"""Attention by torch's `scaled_dot_product_attention`, which needs no Transformer Engine and runs on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megamult.models.common.documents import DocumentMask
from megamult.models.common.rotary_embedding import Rotation, rotate


class RotatedSelfAttention(SelfAttention):
    """Megatron's SelfAttention that also takes a :class:`~megamult.models.common.rotary_embedding.Rotation` in the
    place of rotary angles, and rotates by it. Angles are left to Megatron."""

    _rotation: Rotation | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> Any:
        """Run Megatron's SelfAttention; arguments and results are the same."""
        without = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        self._rotation = rotary_pos_emb if isinstance(rotary_pos_emb, Rotation) and not without else None
        angles = None if isinstance(rotary_pos_emb, Rotation) else rotary_pos_emb
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=angles, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return what Megatron's SelfAttention does, with queries and keys rotated."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self._rotation is not None:
            query, key = rotate(query, self._rotation), rotate(key, self._rotation)
        return (query, key, *others)


class SdpaAttention(torch.nn.Module):
    """Attention softmax(Q K^T / sqrt(d) + mask) V with a causal mask or a mask of documents. The query heads of a group
    share one key head and one value head."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"attention type {attention_type!r} with mask {attn_mask_type}: SdpaAttention does causal "
                "self-attention only"
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | DocumentMask | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the attention's output, [seq, batch, heads/tp * dim].

        Args:
            query: [seq, batch, heads/tp, dim] queries.
            key, value: [seq, batch, groups/tp, dim] keys and values.
            attention_mask: documents that do not see each other, or [batch, 1, query, key] numbers to add to the logits
                (:func:`megamult.models.common.documents.attention_mask`). None, or a mask of booleans as Megatron makes
                it, which is not read: the causal mask.
        """
        mask = added(attention_mask)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if not q.is_cuda:
            v = v.contiguous()  # the CPU's kernel reads values that lie together faster than this copy takes
        if q.is_cuda and (q.dtype == torch.float32 or mask is not None) and q.shape[1] != k.shape[1]:
            # No fused CUDA kernel supports grouped queries in fp32 or with a mask, and the unfused one would store all
            # scores. So repeat keys and values for each query head.
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        context = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def added(attention_mask: Tensor | DocumentMask | None) -> Tensor | None:
    """Return the numbers that an attention mask adds to the logits, and None for None and a mask of booleans."""
    if isinstance(attention_mask, DocumentMask):
        return attention_mask.added
    return attention_mask if attention_mask is not None and attention_mask.is_floating_point() else None
