"""Sums over ranks that an optimizer step takes before it updates anything: partial gradients, and the norms."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.optim.clip import LocalSquares, Norms
from megamult.parameters.axes import MODEL_AXES
from megamult.zero.partition import Partition


def sum_partial_gradients(partition: Partition, gradients: list[Tensor]) -> None:
    """Sum, in place, the gradients that are partial over an axis, in one packed collective per axis.

    A parameter that is replicated along an axis has the same slices on all processes there, so packed buffers line up.

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
    """Norms of the gradients of a partition over all ranks, in which each element of the model counts once."""

    def __init__(self, partition: Partition) -> None:
        here = partition.slices[0].tensor.device if partition.slices else device.local_device()
        self._squares, self._mesh = LocalSquares(partition, here), partition.mesh

    def __call__(self, gradients: list[Tensor], folded: Tensor | None) -> Norms:
        """Return the norms. Collective over all ranks.

        Args:
            gradients: the gradient of each slice of the partition.
            folded: [entries] gradient of folded multipliers, the same on every rank; None: there are none.
        """
        squares = self._mesh.sum_over(self._squares(gradients).to(device.local_device()))
        if folded is not None:
            squares[1] += folded.double().square().sum()
        return Norms(*squares.sqrt().tolist())
