"""Create a layer's multipliers with their specs, and complete the gradients of replicated ones.

From its part of a weight a rank gets only a part of the gradient of a replicated multiplier. :data:`GradSync` says
where the parts are summed over tensor-parallel ranks:

- ``"backward"`` (default of the layers, for any training loop): backward all-reduces the multipliers of a layer
  together, one small collective per layer and micro-batch.
- ``"step"`` (our optimizer): the parameter's spec names the axis in `reduce_over`, and the optimizer sums all of them
  in one packed collective per *optimizer step*: nothing is added to a micro-batch, with sequence parallelism or
  without.

In bf16 a multiplier near 1 could only move in steps of 0.4 to 0.8 %. Where an optimizer keeps fp32 masters,
:mod:`megamult.zero.full_precision` brings the multipliers' masters to every rank after each step, and forward passes
scale by them; the bf16 parameter carries the gradient.
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
    module: torch.nn.Module, weight: Parameter, spec: ParameterSpec, placement: Placement, grid: Grid, partial: bool
) -> None:
    """Create the multipliers of a module's weight, all ones; :data:`megamult.multipliers.specs.LEAVES` names them.

    A side on which no part of the weight is scaled gets None in place of a parameter.

    Args:
        module: module that the parameters are registered on.
        weight: weight whose dtype and device they take.
        spec: the spec of the weight, two-dimensional.
        placement: the sides on which each role is scaled.
        grid: the process grid; each parameter has the local shape of its spec there.
        partial: gradients of replicated multipliers must still be summed over tensor-parallel ranks in the step.
    """
    for side, leaf in specs.LEAVES.items():
        parameter = None
        if parts := spec.parts_with(placement, side):
            stated = specs.multiplier(side, spec, parts, partial)
            ones = torch.ones(stated.local_shape(grid), dtype=weight.dtype, device=weight.device)
            parameter = Parameter(ones)
            set_spec(parameter, stated)
        module.register_parameter(leaf, parameter)


def multipliers_of(module: torch.nn.Module) -> dict[Side, Parameter | None]:
    """Return the multipliers that :func:`register_multipliers` created on a module, by side; None where it has none."""
    return {side: getattr(module, leaf) for side, leaf in specs.LEAVES.items()}


FULL_PRECISION = "full_precision_value"
"""Name of a parameter's attribute: its fp32 value, in the shape of the local parameter."""


def full_precision(parameter: Parameter) -> Tensor:
    """Return what a forward pass uses: the parameter's fp32 value where there is one, else the parameter itself."""
    value = getattr(parameter, FULL_PRECISION, None)
    return parameter if value is None else _FullPrecision.apply(parameter, value)


class _FullPrecision(torch.autograd.Function):
    """The fp32 value of a parameter; its gradient goes to the parameter, in the parameter's dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class SumOverTensorParallel(torch.autograd.Function):
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
