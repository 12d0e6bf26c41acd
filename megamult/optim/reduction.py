"""Sums over ranks before the update of an optimizer step: sums of partial gradients, and sums of squares for norms."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.optim.clip import LocalSquares, Norms
from megamult.optim.rates import Rates
from megamult.parameters.axes import MODEL_AXES
from megamult.zero.partition import Partition


def sum_partial_gradients(partition: Partition, gradients: list[Tensor]) -> None:
    """Sum gradients in place over the axes along which each process has only a part of the sum
    (:attr:`ParameterSpec.reduce_over`).

    All gradients that are summed over one axis are packed into one buffer, so each axis takes one collective. The
    parameter of such a gradient is replicated along the axis. All processes along the axis therefore have the same
    slices of it, and their buffers have the same layout.

    Args:
        gradients: [length] gradient of each slice of the partition.
    """
    for axis in MODEL_AXES:
        if partition.mesh.size_of(axis) == 1:
            continue
        partial = [g for piece, g in zip(partition.slices, gradients, strict=True) if axis in piece.spec.reduce_over]
        if partial:
            packed = torch.cat(partial)
            partition.mesh.sum_over(packed, axis)
            torch._foreach_copy_(partial, list(packed.split([g.numel() for g in partial])))


class GlobalNorms:
    """Function that returns the gradient norms of the whole model, in which each element counts once."""

    def __init__(self, partition: Partition, rates: Rates) -> None:
        here = partition.slices[0].tensor.device if partition.slices else device.local_device()
        self._squares, self._mesh = LocalSquares(partition, here, rates), partition.mesh

    def __call__(self, gradients: list[Tensor], folded: Tensor | None) -> Norms:
        """Return the norms. All ranks must call this together.

        Args:
            gradients: [length] gradient of each slice of the partition.
            folded: [entries] gradient of folded multipliers, the same on every rank; None if there are none.
        """
        squares = self._mesh.sum_over(self._squares(gradients).to(device.local_device()))
        if folded is not None:
            squares[1] += folded.double().square().sum()
        return Norms(*squares.sqrt().tolist())
