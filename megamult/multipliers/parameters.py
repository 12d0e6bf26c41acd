"""Create a layer's multipliers with their specs, and sum the partial gradients of replicated multipliers.

A rank computes with only its shard of a weight, so it gets only a partial gradient of a replicated multiplier.
:data:`GradSync` says when the partial gradients are summed over tensor-parallel ranks:

- ``"backward"`` (default of the layers, for any training loop): backward all-reduces the gradients of a layer's
  replicated multipliers together, in one small collective per layer and micro-batch.
- ``"step"`` (for megamult's optimizers): the spec of the multiplier names the axis in `reduce_over`, and the optimizer
  sums the gradients of all replicated multipliers in one packed collective per *optimizer step*. Micro-batches have no
  collective for multipliers, with or without sequence parallelism.

A bf16 multiplier near 1 could only change in steps of 0.4 to 0.8 %. If an optimizer has fp32 masters,
:mod:`megamult.zero.full_precision` brings the masters of a rank's multipliers to all of its data-parallel ranks after
each step. Forward passes scale by these fp32 values, and backward leaves the gradient on the bf16 parameter.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.multipliers import specs
from megamult.parameters.axes import Grid
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Side
from megamult.parameters.stated import set_spec

GradSync = Literal["backward", "step"]


def register_multipliers(
    module: torch.nn.Module,
    weight: Parameter,
    spec: ParameterSpec,
    placement: Placement,
    grid: Grid,
    partial: bool,
    shared_columns: bool = False,
) -> None:
    """Create the multipliers of a module's weight, with the value 1.

    Their names are in :data:`megamult.multipliers.specs.LEAVES`. If no part of the weight is scaled on a side, None is
    registered under the name of the multipliers on that side.

    Args:
        module: module on which the multipliers are registered.
        weight: the module's weight; the multipliers get its dtype and device.
        spec: spec of the weight, which must have two dimensions.
        placement: the sides on which each role is scaled.
        grid: number of processes along each axis, which decides the local shapes of the multipliers.
        partial: whether the optimizer step must still sum the gradients of replicated multipliers over tensor-parallel
            ranks.
        shared_columns: whether the logical matrices of the weight have the same column multipliers.
    """
    for side, leaf in specs.LEAVES.items():
        parameter = None
        if parts := spec.parts_with(placement, side):
            stated = specs.multiplier(side, spec, parts, partial, shared_columns)
            ones = torch.ones(stated.local_shape(grid), dtype=weight.dtype, device=weight.device)
            parameter = Parameter(ones)
            set_spec(parameter, stated)
        module.register_parameter(leaf, parameter)


def multipliers_of(module: torch.nn.Module) -> dict[Side, Parameter | None]:
    """Return the multipliers that :func:`register_multipliers` created on a module, by side. The value is None for a
    side that has none."""
    return {side: getattr(module, leaf) for side, leaf in specs.LEAVES.items()}


FULL_PRECISION = "full_precision_value"
"""Name of the attribute that holds a parameter's fp32 value, in the local shape of the parameter."""


def full_precision(parameter: Parameter) -> Tensor:
    """Return the tensor for forward passes: the parameter's fp32 value if there is one, else the parameter itself."""
    value = getattr(parameter, FULL_PRECISION, None)
    return parameter if value is None else _FullPrecision.apply(parameter, value)


class _FullPrecision(torch.autograd.Function):
    """Replacement of a parameter by its fp32 value. In backward, the gradient is cast to the parameter's dtype and
    goes to the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class SumOverTensorParallel(torch.autograd.Function):
    """Identity in forward. Backward sums the gradients over the group, in one collective for all tensors."""

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
