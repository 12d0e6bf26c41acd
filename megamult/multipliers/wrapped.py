"""Effective weights in the place of weights: a layer computes with W_eff and knows nothing of multipliers.

It serves every layer that reads its parameter `weight` when it is called, and of that saves only the weight itself for
backward: Megatron's linear layers, `torch.nn.Linear`, Transformer Engine's without FP8. The layer's own computation and
communication stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megamult.multipliers.layer_scaling import LayerScaling


class _EffectiveWeight(torch.autograd.Function):
    """W_eff from W and its multipliers. Saves the four parameters, nothing of its own."""

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
        # The gradient of W_eff was made by the product for this node only, so it may be overwritten.
        return (*ctx.scaling.gradients(grad.contiguous(), weight, row, col, scalar), None)


@contextlib.contextmanager
def effective_weight(
    module: torch.nn.Module, weight: Tensor, multipliers: Sequence[Tensor | None], scaling: LayerScaling
) -> Iterator[Tensor]:
    """Let `module.weight` be W_eff = s diag(r) W diag(c) within the context, as for one forward pass.

    W_eff is not kept for backward, but made again from W: where the layer saves it, nothing is saved.

    Args:
        module: the layer; its parameter `weight` stays registered as it is.
        weight: W, [out, in] of this rank's shard: the module's own, or one that the caller gave.
        multipliers: row, column and scalar multipliers; None: there are none of a kind.
        scaling: which of them scales which row and column.

    Yields:
        W_eff, in the weight's dtype.
    """
    effective = _EffectiveWeight.apply(weight, *multipliers, scaling)
    start, numel = effective.data_ptr(), effective.numel()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        # A layer may save its weight transposed: then that view of it is made again.
        whole = saved.data_ptr() == start and saved.numel() == numel
        return (saved.shape, saved.stride()) if whole else saved

    def unpack(saved: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            again = scaling.scale(weight.detach(), *(None if each is None else each.detach() for each in multipliers))
        return again.as_strided(*saved)

    # A module finds its parameters only after its own attributes: this one hides the parameter from the layer, and
    # leaves it in place for everyone who asks for parameters.
    module.__dict__["weight"] = effective
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield effective
    finally:
        del module.__dict__["weight"]
