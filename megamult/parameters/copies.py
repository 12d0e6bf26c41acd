"""Copies of blocks: which elements of a shard several processes hold, so that partial gradients of them can be summed.

A block with fewer pieces than an axis has processes (`Block.pieces`) is held by several of them. If the spec names the
axis in `reduce_over`, each of these processes computes only a part of the gradient of its copy: Mamba's B and C, for
example, get on each process only the gradient that the heads of this process give. The module does no communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megamult.parameters.axes import Axis, Coordinates
from megamult.parameters.spec import ParameterSpec


@dataclass(frozen=True)
class Copied:
    """Contiguous elements of which other processes along an axis hold copies."""

    start: int
    """First element, counted from the start of the interval that was asked about."""
    length: int
    piece: int
    """Index of the piece of the block, which all copies have in common."""
    pieces: int
    """Number of pieces of the block. Processes with other pieces hold them at the same elements of their shards."""


def copied_intervals(
    spec: ParameterSpec, axis: Axis, coordinates: Coordinates, start: int, length: int
) -> list[Copied]:
    """Return the elements of an interval of which other processes along an axis hold copies.

    Args:
        spec: spec of a parameter that the axis shards along dimension 0.
        axis: the axis.
        coordinates: coordinates of the process.
        start, length: the interval, in elements of the process's flattened shard.
    """
    sharding = next((each for each in spec.shardings if each.axis == axis and each.dim == 0), None)
    if sharding is None:
        return []
    rank, processes = coordinates.on(axis)
    cols = spec.local_cols(coordinates)[1]
    stored = replace(spec, compact=False).local_segments(coordinates) if spec.compact else ()

    def element(row: int) -> int:
        """Return the position of the first element of a local row, or of where it would be in a compact shard."""
        return cols * (sum(min(max(row - s.start, 0), s.length) for s in stored) if spec.compact else row)

    found, row, inner = [], 0, math.prod(spec.shape[1:-1])
    for block in sharding.blocks:
        pieces = block.cuts(processes)
        height, copies = block.size // pieces * inner, processes // pieces
        if copies > 1:
            begin, end = max(start, element(row)), min(start + length, element(row + height))
            if begin < end:
                found.append(Copied(begin - start, end - begin, rank // copies, pieces))
        row += height
    return found
