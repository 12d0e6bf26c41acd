"""Names of multipliers, and their specs, which follow from the spec of the weight that they scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megamult.parameters.axes import Axis
from megamult.parameters.shards import Sharding
from megamult.parameters.spec import ParameterSpec, Part, Segment, Side

LEAVES: dict[Side, str] = {"row": "row_multiplier", "col": "col_multiplier", "scalar": "scalar_multiplier"}
"""Names of the multipliers on each side, as parameters of the module whose `weight` they scale."""


def multiplier(
    side: Side, weight: ParameterSpec, selected: Sequence[int], partial: bool, shared_columns: bool = False
) -> ParameterSpec:
    """Describe the multipliers on one side of the selected parts of a weight.

    Args:
        side: side of the weight that the multipliers scale.
        weight, selected, partial: see :func:`row_multiplier`.
        shared_columns: see :func:`col_multiplier`.
    """
    if side == "col":
        return col_multiplier(weight, selected, partial, shared_columns)
    return (row_multiplier if side == "row" else scalar_multiplier)(weight, selected, partial)


def row_multiplier(weight: ParameterSpec, selected: Sequence[int], partial: bool) -> ParameterSpec:
    """Describe the row multipliers r[rows] of the selected parts of a weight [rows, cols]. They are sharded like the
    rows of the weight, and are in the same order.

    Args:
        weight: spec of the weight, which must have two dimensions.
        selected: indices of the parts of the weight that are scaled.
        partial: whether the optimizer step must still sum the gradients of replicated multipliers over tensor-parallel
            ranks.
    """
    index = {part: i for i, part in enumerate(selected)}
    shardings = tuple(each for each in weight.shardings if each.dim == 0)
    return ParameterSpec(
        tuple(Part(weight.parts[i].name, weight.parts[i].role, weight.parts[i].shape[:1]) for i in selected),
        weight.shape[:1],
        tuple(Segment(s.start, index[s.part], s.part_start, s.length) for s in weight.segments if s.part in index),
        shardings,
        fp32=True,
        # A process has only a part of the gradient of copied rows of the weight, and so of their multipliers.
        reduce_over=_reduce_over(shardings, partial) or tuple(a for a in weight.reduce_over if a == "tensor"),
        side="row",
        compact=True,
    )


def col_multiplier(
    weight: ParameterSpec, selected: Sequence[int], partial: bool, shared: bool = False
) -> ParameterSpec:
    """Describe the column multipliers c[cols] of each selected part of a weight, one vector after the other. They are
    sharded like the columns of the weight.

    Args:
        weight, selected, partial: see :func:`row_multiplier`.
        shared: whether all of these parts have the same column multipliers. Each still has its own copy, so that names
            and shapes, also in checkpoints, are the same as without sharing.
    """
    cols, count = weight.shape[1], len(selected)
    shardings = tuple(replace(each, dim=0, blocks=each.blocks * count) for each in weight.shardings if each.dim == 1)
    return ParameterSpec(
        tuple(Part(weight.parts[i].name, weight.parts[i].role, (cols,)) for i in selected),
        (count * cols,),
        tuple(Segment(i * cols, i, 0, cols) for i in range(count)),
        shardings,
        fp32=True,
        reduce_over=_reduce_over(shardings, partial),
        side="col",
        shared=shared and count > 1,
    )


def scalar_multiplier(weight: ParameterSpec, selected: Sequence[int], partial: bool) -> ParameterSpec:
    """Describe the scalars s of a weight: one replicated scalar for each selected part."""
    return ParameterSpec(
        tuple(Part(weight.parts[i].name, weight.parts[i].role, (1,)) for i in selected),
        (len(selected),),
        tuple(Segment(i, i, 0, 1) for i in range(len(selected))),
        fp32=True,
        reduce_over=_reduce_over((), partial),
        side="scalar",
    )


def _reduce_over(shardings: Sequence[Sharding], partial: bool) -> tuple[Axis, ...]:
    """Return the axes over which the optimizer step sums a multiplier's gradient. There is none if the multiplier is
    sharded, because each rank then computes the whole gradient of its shard."""
    sharded = any(each.axis == "tensor" for each in shardings)
    return ("tensor",) if partial and not sharded else ()
