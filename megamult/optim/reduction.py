"""Sums over ranks before the update of an optimizer step: sums of partial gradients, and sums of squares for norms."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.optim.clip import LocalSquares, Norms
from megamult.optim.rates import Rates
from megamult.parameters.axes import AXES, MODEL_AXES, Axis, Coordinates
from megamult.parameters.copies import Copied, copied_intervals
from megamult.zero.partition import Partition, Slice


class PartialGradients:
    """Function that sums gradients over the axes along which each process has only a part of the sum
    (:attr:`ParameterSpec.reduce_over`).

    All gradients that are summed over one axis are packed into one buffer, so each axis takes one collective. A
    parameter that is replicated along the axis has the same slices on all processes along it. A block with copies has a
    place in the buffer for each of its pieces; a process leaves the places of the pieces that it does not hold at 0.

    Args:
        partition: partition whose gradients are summed.

    Raises:
        ValueError: the copies of a block are at different elements of the processes' shards.
    """

    def __init__(self, partition: Partition) -> None:
        self._mesh = partition.mesh
        self._whole: dict[Axis, list[int]] = {}
        self._copied: dict[Axis, list[tuple[int, Copied]]] = {}
        for axis in MODEL_AXES:
            if partition.mesh.size_of(axis) == 1:
                continue
            partial = [(i, each) for i, each in enumerate(partition.slices) if axis in each.spec.reduce_over]
            self._whole[axis] = [i for i, each in partial if each.spec.dim_over(axis) is None]
            self._copied[axis] = [
                (i, copied) for i, each in partial for copied in _copied(each, axis, partition.mesh.coordinates)
            ]

    def __call__(self, gradients: list[Tensor]) -> None:
        """Sum in place. All ranks must call this together.

        Args:
            gradients: [length] gradient of each slice of the partition.
        """
        for axis, indices in self._whole.items():
            places = [gradients[i] for i in indices]
            buffers = list(places)
            for i, copied in self._copied[axis]:
                own = gradients[i][copied.start : copied.start + copied.length]
                pieces = own.new_zeros(copied.pieces, copied.length)
                pieces[copied.piece] = own
                places.append(own)
                buffers.append(pieces.view(-1))
            if not buffers:
                continue
            packed = torch.cat(buffers)
            self._mesh.sum_over(packed, axis)
            summed = list(packed.split([buffer.numel() for buffer in buffers]))
            for k, (_, copied) in enumerate(self._copied[axis], len(indices)):
                summed[k] = summed[k].view(copied.pieces, copied.length)[copied.piece]
            torch._foreach_copy_(places, summed)


def _copied(piece: Slice, axis: Axis, coordinates: Coordinates) -> list[Copied]:
    """Return the elements of a slice of which other processes along the axis hold copies."""
    grid = coordinates.grid
    places: dict[str, int] = {each: coordinates.on(each)[0] for each in AXES}
    every = [
        copied_intervals(piece.spec, axis, Coordinates(grid, **{**places, str(axis): rank}), piece.start, piece.length)
        for rank in range(grid.size_of(axis))
    ]
    if len({tuple((each.start, each.length, each.pieces) for each in one) for one in every}) > 1:
        raise ValueError(
            f"processes along the {axis} axis hold the copies of a block of {piece.name} at different elements of "
            "their shards, so their partial gradients cannot be summed: store the block as a parameter of its own"
        )
    return every[coordinates.on(axis)[0]]


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
