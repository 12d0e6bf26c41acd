"""Megatron's column-parallel, row-parallel and vocab-parallel layers with learnable multipliers.

Drop-in subclasses: with no multipliers selected they compute what Megatron's compute, and a fresh layer
(multipliers at 1) does too. A linear layer scales its *local weight*, W_eff = s diag(r) W diag(c), and hands it to
Megatron's own GEMM, so its overlap of communication and computation stays as it is::

                 column-parallel, rank p                row-parallel, rank p
          c (replicated, one per matrix)                  c_p (sharded)
            .------------------.                           .--------.
      r_p   |    W_p rows      |                      r    |  W_p   |
  (sharded) |  [out/tp, in]    |            (replicated)   | columns|  [out, in/tp]
            '------------------'                           '--------'

The weight is the smaller side whenever a rank's micro-batch has more than in * out / (in + out) tokens, and, unlike
the activations, it lets every matrix of a fused projection have column multipliers of its own. W_eff is not saved
for backward: it is computed again from the weight. The embedding scales the rows that it looked up.

Who sums a replicated multiplier's gradient over tensor-parallel ranks. A rank's part of W gives a part of the
sum, so what backward leaves is partial. `grad_sync` says who completes it:

- ``"backward"`` (default, for any training loop): backward all-reduces the multipliers of a layer together, one
  small collective per layer and micro-batch.
- ``"step"`` (our optimizer): the parameter's layout says `partial_over_tp`, and the optimizer sums all of them in
  one packed collective per *optimizer step*: nothing is added to a micro-batch, with sequence parallelism or
  without.

Source: arXiv 2601.04890.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter

from megamult import layout as lo
from megamult.layout import Layout, Role, Run
from megamult.multipliers import kernels
from megamult.multipliers.placement import NAMED, Placement
from megamult.multipliers.sharded_state import multiplier_sharded_tensors

GradSync = Literal["backward", "step"]


class _EffectiveWeight(torch.autograd.Function):
    """W_eff from W and its multipliers. Saves the four parameters, nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None, plan: _Plan
    ) -> Tensor:
        ctx.save_for_backward(weight, row, col, scalar)
        ctx.plan = plan
        return plan.scale(weight, row, col, scalar)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, row, col, scalar = ctx.saved_tensors
        # The gradient of W_eff was made by the GEMM for this node alone, so it may be overwritten.
        return (*ctx.plan.gradients(grad.contiguous(), weight, row, col, scalar), None)


class _SumOverTensorParallel(torch.autograd.Function):
    """Identity forward; backward sums the gradients over the group, all tensors in one collective."""

    @staticmethod
    def forward(ctx: Any, group: torch.distributed.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(packed, group=ctx.group)
        pieces = packed.split([g.numel() for g in grads])
        return (None, *(piece.view_as(g) for piece, g in zip(pieces, grads, strict=True)))


def _spans(runs: tuple[Run, ...], col_of: dict[int, int], rows: int) -> tuple[kernels.Span, ...]:
    """The runs as spans; rows of padding, which are part of no run, as spans without column multipliers."""
    spans: list[kernels.Span] = []
    position = 0
    for run in runs:
        if position < run.start:
            spans.append(kernels.Span(position, run.start, None))
        position = run.start + run.length
        spans.append(kernels.Span(run.start, position, col_of.get(run.part)))
    if position < rows:
        spans.append(kernels.Span(position, rows, None))
    return tuple(spans)


class _Plan:
    """Where the multipliers of one layer's local weight sit: local rows, column vectors, scalars."""

    def __init__(self, weight: Layout, placement: Placement, tp_rank: int, tp_size: int) -> None:
        self.row_parts = weight.parts_with(placement, "row")
        self.col_parts = weight.parts_with(placement, "col")
        self.scalar_parts = weight.parts_with(placement, "scalar")
        self.local_cols = weight.local_shape(tp_size)[1]
        self.local_rows = weight.local_shape(tp_size)[0]
        runs = weight.local_runs(tp_rank, tp_size)
        col_of = {part: i for i, part in enumerate(self.col_parts)}
        self.spans = _spans(runs, col_of, self.local_rows)
        self.row_runs: list[tuple[int, int, int]] = []  # (local row, row multiplier, length)
        position = 0
        for run in runs:
            if run.part in self.row_parts:
                self.row_runs.append((run.start, position, run.length))
                position += run.length
        scalar_of = {part: i for i, part in enumerate(self.scalar_parts)}
        self.scalar_runs = [(r.start, scalar_of[r.part], r.length) for r in runs if r.part in scalar_of]
        self.rows_are_whole = self.row_runs == [(s.start, s.start, s.stop - s.start) for s in self.spans] and (
            position == self.local_rows
        )

    def _rho(self, row: Tensor | None, scalar: Tensor | None) -> Tensor | None:
        """rho[out]: row multipliers times scalars, 1 for rows that have neither."""
        if scalar is None and (row is None or self.rows_are_whole):
            return row
        example = row if row is not None else scalar
        assert example is not None
        rho = torch.ones(self.local_rows, dtype=example.dtype, device=example.device)
        if row is not None:
            for start, position, length in self.row_runs:
                rho[start : start + length] = row[position : position + length]
        if scalar is not None:
            for start, index, length in self.scalar_runs:
                rho[start : start + length] *= scalar[index]
        return rho

    def scale(self, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None) -> Tensor:
        kappa = None if col is None else col.view(-1, self.local_cols)
        return kernels.scale(weight, self._rho(row, scalar), kappa, self.spans)

    def gradients(
        self, grad: Tensor, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """dL/dW, dL/dr, dL/dc, dL/ds by equation 4 of arXiv 2601.04890, in the parameters' dtypes."""
        kappa = None if col is None else col.view(-1, self.local_cols)
        needs_row_dot = row is not None or scalar is not None
        back = kernels.scale_backward(
            grad, weight, self._rho(row, scalar), kappa, self.spans, needs_row_dot=needs_row_dot
        )
        grad_row = grad_scalar = None
        if row is not None:
            assert back.row_dot is not None
            dot = back.row_dot
            scales = self._rho(None, None if scalar is None else scalar.float())
            if scales is not None:
                dot = dot * scales  # dr = s sum_j W c G
            if self.rows_are_whole:
                grad_row = dot.to(row.dtype)
            else:
                grad_row = torch.zeros_like(row)
                for start, position, length in self.row_runs:
                    grad_row[position : position + length] = dot[start : start + length]
        if scalar is not None:
            assert back.row_dot is not None
            rho = self._rho(row, None)
            dot = back.row_dot if rho is None else back.row_dot * rho.float()  # ds = sum_i r sum_j W c G
            grad_scalar = torch.zeros_like(scalar, dtype=torch.float32)
            for start, index, length in self.scalar_runs:
                grad_scalar[index] += dot[start : start + length].sum()
            grad_scalar = grad_scalar.to(scalar.dtype)
        grad_col = None if back.col is None or col is None else back.col.view(-1).to(col.dtype)
        return back.weight, grad_row, grad_col, grad_scalar


def _register_multipliers(
    module: torch.nn.Module, weight: Parameter, layout: Layout, placement: Placement, tp_size: int, partial: bool
) -> None:
    """Create `row_multiplier`, `col_multiplier`, `scalar_multiplier` (None where not selected), all ones."""
    makers: dict[str, Callable[..., Layout]] = {
        "row": lo.row_multiplier,
        "col": lo.col_multiplier,
        "scalar": lo.scalar_multiplier,
    }
    for side, make in makers.items():
        parts = layout.parts_with(placement, side)  # type: ignore[arg-type]
        if not parts:
            module.register_parameter(f"{side}_multiplier", None)
            continue
        side_layout = make(layout, parts, partial)
        ones = torch.ones(side_layout.local_shape(tp_size), dtype=weight.dtype, device=weight.device)
        parameter = Parameter(ones)
        lo.attach(parameter, side_layout)
        module.register_parameter(f"{side}_multiplier", parameter)


class _MultiplierLinear:
    """What the column- and the row-parallel layer share. Mixed in before Megatron's class."""

    weight: Parameter
    row_multiplier: Parameter | None
    col_multiplier: Parameter | None
    scalar_multiplier: Parameter | None
    tp_group: torch.distributed.ProcessGroup

    def _setup_multipliers(self, layout: Layout, placement: Placement | None, grad_sync: GradSync) -> None:
        module: Any = self
        chosen = NAMED["all"] if placement is None else placement
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        lo.attach(self.weight, layout)
        expected = layout.local_shape(tp_size)
        actual = tuple(getattr(self.weight, "ds_shape", self.weight.shape))
        if expected != actual:
            raise ValueError(
                f"the layout of {type(self).__name__} describes a local weight {expected} at tensor parallel "
                f"{tp_size}, Megatron made {actual}: pass the layout of the global matrix {layout.shape}"
            )
        partial = tp_size > 1 and grad_sync == "step"
        _register_multipliers(module, self.weight, layout, chosen, tp_size, partial)
        self._plan = _Plan(layout, chosen, tp_rank, tp_size)
        self._has_multipliers = any(p is not None for p in self._multipliers())
        self._sum_in_backward = tp_size > 1 and grad_sync == "backward"
        if self._has_multipliers and module.config.gradient_accumulation_fusion:
            raise ValueError(
                "gradient_accumulation_fusion is True: multipliers need the gradient of the effective weight; "
                "set it to False"
            )

    def _multipliers(self) -> tuple[Parameter | None, Parameter | None, Parameter | None]:
        return self.row_multiplier, self.col_multiplier, self.scalar_multiplier

    def _completed(self) -> list[Tensor | None]:
        """The multipliers; replicated ones get their gradient summed over TP in backward if that is our job."""
        tensors: list[Tensor | None] = list(self._multipliers())
        if self._sum_in_backward:
            replicated = [
                i for i, p in enumerate(self._multipliers()) if p is not None and lo.layout_of(p).tp_dim is None
            ]
            if replicated:
                summed = _SumOverTensorParallel.apply(self.tp_group, *(tensors[i] for i in replicated))
                for i, tensor in zip(replicated, summed, strict=True):
                    tensors[i] = tensor
        return tensors

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parent: Any = super()
        if not self._has_multipliers:
            return parent._forward_impl(input, weight, *args, **kwargs)
        row, col, scalar = self._completed()
        effective = _EffectiveWeight.apply(weight, row, col, scalar, self._plan)
        location = (effective.data_ptr(), effective.shape)

        # Megatron's GEMM saves its weight for backward. Instead of W_eff keep nothing, and make it again.
        def pack(saved: Tensor) -> Tensor | None:
            return None if (saved.data_ptr(), saved.shape) == location else saved

        def unpack(saved: Tensor | None) -> Tensor:
            if saved is not None:
                return saved
            with torch.no_grad():
                return self._plan.scale(
                    weight.detach(), *(None if p is None else p.detach() for p in (row, col, scalar))
                )

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return parent._forward_impl(input, effective, *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, plus the multipliers, each logical vector under its own key and global shape."""
        parent: Any = super()
        sharded = parent.sharded_state_dict(prefix, sharded_offsets, metadata)
        multiplier_sharded_tensors(self, sharded, prefix, sharded_offsets, self.tp_group, metadata)  # type: ignore[arg-type]
        return sharded


class MultiplierColumnParallelLinear(_MultiplierLinear, ColumnParallelLinear):
    """Y = X W_eff^T with W_eff = s diag(r) W diag(c), rows sharded over tensor-parallel ranks.

    Args:
        input_size, output_size: global sizes; all other arguments as in Megatron's `ColumnParallelLinear`.
        layout: the logical matrices in the fused rows (:func:`megamult.layout.fused_qkv`,
            :func:`~megamult.layout.fused_gate_up`); default: one matrix of role `role`.
        placement: multipliers by role; default: row and column on every matrix.
        grad_sync: who sums the column multipliers' gradients over TP, see the module's docstring.

    Shapes: x: [seq, batch, in]; y: [seq, batch, out/tp]; `row_multiplier`: [out/tp]; `col_multiplier`:
    [matrices * in]; `scalar_multiplier`: [matrices].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        layout: Layout | None = None,
        role: Role = "q",
        placement: Placement | None = None,
        grad_sync: GradSync = "backward",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        if self.weight is None:
            raise ValueError("skip_weight_param_allocation is True: a layer with multipliers needs a weight of its own")
        self._setup_multipliers(layout or lo.single_matrix(role, output_size, input_size, 0), placement, grad_sync)


class MultiplierRowParallelLinear(_MultiplierLinear, RowParallelLinear):
    """Y = X W_eff^T with W_eff = s diag(r) W diag(c), columns sharded over tensor-parallel ranks.

    Arguments as in Megatron's `RowParallelLinear`, and those of :class:`MultiplierColumnParallelLinear`. A bias is
    added after scaling and is not scaled.

    Shapes: x: [seq, batch, in/tp]; y: [seq, batch, out]; `row_multiplier`: [out]; `col_multiplier`: [in/tp].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        layout: Layout | None = None,
        role: Role = "down",
        placement: Placement | None = None,
        grad_sync: GradSync = "backward",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self._setup_multipliers(layout or lo.single_matrix(role, output_size, input_size, 1), placement, grad_sync)


class _ScaledLookup(torch.autograd.Function):
    """x[t] = r[id_t] W[id_t], zero where the id is not on this rank. Saves no activation."""

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
            flat_grad = flat_grad * row[flat_ids].unsqueeze(-1)
        grad_weight = torch.ops.aten.embedding_dense_backward(flat_grad, flat_ids, weight.shape[0], -1, False)
        return None, None, grad_weight, grad_row


class MultiplierVocabParallelEmbedding(VocabParallelEmbedding):
    """Embedding E_eff = s diag(r) E diag(c), vocabulary rows sharded over tensor-parallel ranks.

    Arguments as in Megatron's `VocabParallelEmbedding`, plus `vocab_size` (rows from it on are padding and carry no
    multipliers; default: none), `placement` and `grad_sync`. c and s are applied after the reduction, where their
    gradient is complete without sequence parallelism and partial with it.

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
        layout = lo.vocabulary("embedding", vocab_size or num_embeddings, num_embeddings, embedding_dim)
        lo.attach(self.weight, layout)
        tp_size = self.tp_group.size()
        scattered = tp_size > 1 and self.reduce_scatter_embeddings
        _register_multipliers(
            self,
            self.weight,
            layout,
            NAMED["all"] if placement is None else placement,
            tp_size,
            partial=scattered and grad_sync == "step",
        )
        self._sum_in_backward = scattered and grad_sync == "backward"

    def forward(self, input_: Tensor) -> Tensor:
        """Look up, scale rows, reduce over TP, scale columns."""
        elsewhere = None
        ids = input_
        if self.tp_group.size() > 1:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            ids = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
        output = _ScaledLookup.apply(ids, elsewhere, self.weight, self.row_multiplier)
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        else:
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        after = [p for p in (self.col_multiplier, self.scalar_multiplier) if p is not None]
        if after and self._sum_in_backward:
            after = list(_SumOverTensorParallel.apply(self.tp_group, *after))
        for multiplier in after:
            output = output * multiplier
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Megatron's, plus the multipliers, each logical vector under its own key and global shape."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        multiplier_sharded_tensors(self, sharded, prefix, sharded_offsets, self.tp_group, metadata)
        return sharded
