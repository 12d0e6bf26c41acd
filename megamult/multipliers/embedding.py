"""Megatron's vocab-parallel embedding with learnable multipliers.

The layer scales the rows that it has looked up and not the whole table, because a micro-batch looks up fewer elements
than the table has. Source: arXiv 2601.04890.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megamult.multipliers.parameters import (
    GradSync,
    SumOverTensorParallel,
    full_precision,
    multipliers_of,
    register_multipliers,
)
from megamult.multipliers.sharded_state import multiplier_sharded_tensors
from megamult.parameters import megatron
from megamult.parameters.axes import Grid
from megamult.parameters.roles import Placement, resolve
from megamult.parameters.stated import set_spec


class _ScaledLookup(torch.autograd.Function):
    """Lookup and scaling: x[t] = r[id_t] W[id_t], or zero if this rank does not hold row id_t. No activation is saved
    for backward."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, elsewhere: Tensor | None, weight: Tensor, row: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids, elsewhere, weight, row)
        output = torch.nn.functional.embedding(ids, weight)
        if row is not None:
            output.mul_(row[ids].unsqueeze(-1))
        if elsewhere is not None:
            output.masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, elsewhere, weight, row = ctx.saved_tensors
        if elsewhere is not None:
            grad = grad.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        flat_ids, flat_grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        grad_row = None
        if row is not None:
            dots = (flat_grad.float() * weight[flat_ids].float()).sum(-1)
            grad_row = torch.zeros_like(row, dtype=torch.float32).index_add_(0, flat_ids, dots).to(row.dtype)
            flat_grad = (flat_grad * row[flat_ids].unsqueeze(-1)).to(grad.dtype)
        grad_weight = torch.ops.aten.embedding_dense_backward(flat_grad, flat_ids, weight.shape[0], -1, False)
        return None, None, grad_weight, grad_row


class MultiplierVocabParallelEmbedding(VocabParallelEmbedding):
    """Embedding E_eff = s diag(r) E diag(c), whose rows are sharded over tensor-parallel ranks.

    Arguments that are not listed are those of Megatron's `VocabParallelEmbedding`.

    c and s are applied after the reduction over tensor-parallel ranks. Without sequence parallelism every rank then has
    all tokens, and so the complete gradients of c and s. With sequence parallelism, a rank has only a part of the
    tokens, and so only partial gradients.

    Args:
        vocab_size: exact number of tokens. Rows from `vocab_size` on are padding, which has no multipliers; default: no
            padding.
        placement, grad_sync: the same as for :class:`megamult.multipliers.linear.MultiplierColumnParallelLinear`.

    Shapes: ids: [batch, seq]; output: [batch, seq, hidden], or [seq/tp, batch, hidden] with
    `reduce_scatter_embeddings`; `row_multiplier`: [vocabulary/tp]; `col_multiplier`: [hidden].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: Callable[[Tensor], Any],
        config: ModelParallelConfig,
        vocab_size: int | None = None,
        placement: Placement | None = None,
        grad_sync: GradSync = "backward",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, init_method=init_method, config=config, **kwargs)
        spec = megatron.vocabulary("embedding", vocab_size or num_embeddings, num_embeddings, embedding_dim)
        set_spec(self.weight, spec)
        tp_size = self.tp_group.size()
        scattered = tp_size > 1 and self.reduce_scatter_embeddings
        register_multipliers(
            self,
            self.weight,
            spec,
            resolve("all") if placement is None else placement,
            Grid(tensor=tp_size),
            partial=scattered and grad_sync == "step",
        )
        self._sum_in_backward = scattered and grad_sync == "backward"

    def forward(self, input_: Tensor) -> Tensor:
        """Look up rows, apply row multipliers, reduce over tensor-parallel ranks, apply column multipliers and scalar.

        For shapes see the class.
        """
        elsewhere = None
        ids = input_
        if self.tp_group.size() > 1:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            ids = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
        multipliers = multipliers_of(self)
        row = None if multipliers["row"] is None else full_precision(multipliers["row"])
        output = _ScaledLookup.apply(ids, elsewhere, self.weight, row)
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        else:
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        after = [full_precision(p) for p in (multipliers["col"], multipliers["scalar"]) if p is not None]
        if after and self._sum_in_backward:
            after = list(SumOverTensorParallel.apply(self.tp_group, *after))
        dtype = output.dtype
        for multiplier in after:
            output = output * multiplier
        return output.to(dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Return Megatron's sharded state dict with the multipliers added. Each logical vector of multipliers has its
        own key and global shape.

        `metadata` must hold `dp_cp_group`, which Megatron's own layers need too.
        """
        assert metadata is not None
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        multiplier_sharded_tensors(self, sharded, prefix, sharded_offsets, self.tp_group, metadata)
        return sharded
