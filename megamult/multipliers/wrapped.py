"""Replacement of a layer's weight by the effective weight in its forward pass.

The layer computes with W_eff and knows nothing of multipliers. Its own computation and communication do not change.

The layer must read its parameter `weight` when it is called. For backward it may save the weight or a transposed
view of it, but no other tensor that is made from the weight. This holds for Megatron's linear layers,
`torch.nn.Linear`, and the linear layers of Transformer Engine without FP8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megamult.multipliers.layer_scaling import LayerScaling


class _EffectiveWeight(torch.autograd.Function):
    """Computation of W_eff from W and its multipliers. Only W and the multipliers are saved for backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None, scaling: LayerScaling
    ) -> Tensor:
        ctx.save_for_backward(weight, row, col, scalar)
        ctx.scaling = scaling
        return scaling.scale(weight, row, col, scalar)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, row, col, scalar = ctx.saved_tensors
        # The layer's matrix product made the gradient of W_eff for this function only, so it may be overwritten.
        return (*ctx.scaling.gradients(grad.contiguous(), weight, row, col, scalar), None)


@contextlib.contextmanager
def effective_weight(
    module: torch.nn.Module, weight: Tensor, multipliers: Sequence[Tensor | None], scaling: LayerScaling
) -> Iterator[Tensor]:
    """Let `module.weight` be W_eff = s diag(r) W diag(c) within the context, for one forward pass.

    If the layer saves W_eff for backward, only its shape and strides are stored, and backward computes W_eff again from
    W.

    Args:
        module: the layer; its parameter `weight` stays registered.
        weight: W[out, in] of this rank's shard: the module's own weight, or a weight that the layer's caller passed.
        multipliers: row, column and scalar multipliers. None stands for a side on which the layer has none.
        scaling: object that scales the weight by these multipliers.

    Yields:
        W_eff, in the weight's dtype.
    """
    effective = _EffectiveWeight.apply(weight, *multipliers, scaling)
    start, numel = effective.data_ptr(), effective.numel()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        # A layer may save a transposed view of its weight. The strides say which view backward must make again.
        whole = saved.data_ptr() == start and saved.numel() == numel
        return (saved.shape, saved.stride()) if whole else saved

    def unpack(saved: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            again = scaling.scale(weight.detach(), *(None if each is None else each.detach() for each in multipliers))
        return again.as_strided(*saved)

    # Python finds an entry of `__dict__` before the module looks among its parameters. This entry therefore hides the
    # parameter from the layer's code, while `module.parameters()` still yields the parameter.
    module.__dict__["weight"] = effective
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield effective
    finally:
        del module.__dict__["weight"]
