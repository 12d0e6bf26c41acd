"""A flat interval of a shard, seen as rectangles of the logical tensors that it holds.

ZeRO cuts parameters into flat intervals. Muon and all other code that works on logical tensors (Q, K, V, gate, up ...)
needs to know which elements of which tensor an interval holds.

The module does not use torch.distributed, so one process can test any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamult.parameters.axes import Coordinates
from megamult.parameters.spec import ParameterSpec


@dataclass(frozen=True)
class Rectangle:
    """Elements [row, row + height) x [col, col + width) of a logical tensor.

    The last dimension of the tensor counts as its columns, and all others together as its rows. A vector is one column.
    The elements are contiguous in a flat interval of a shard, row by row. The first one is `offset` elements after the
    start of the interval.
    """

    part: int
    row: int
    col: int
    height: int
    width: int
    offset: int
    counted: bool = True
    """Whether a sum over processes includes this process's copy of the elements."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.height * self.width


def rectangles(spec: ParameterSpec, coordinates: Coordinates, start: int, length: int) -> list[Rectangle]:
    """Return the rectangles that make up elements [start, start + length) of one process's flattened shard.

    Args:
        spec: spec of the parameter.
        coordinates: coordinates of the process.
        start, length: the interval, in elements of the flattened shard.

    Returns:
        Rectangles in the order of their offsets, at most three per segment (the rest of a row, whole rows, the
        beginning of a row). No rectangle contains padding.
    """
    first, cols = spec.local_cols(coordinates)
    segments, counted = spec.local_segments(coordinates), spec.counted_segments(coordinates)
    found: list[Rectangle] = []
    for segment, counts in zip(segments, counted, strict=True):
        begin = max(start, segment.start * cols)
        end = min(start + length, (segment.start + segment.length) * cols)
        if begin >= end:
            continue
        whole_begin = -(-begin // cols) * cols
        whole_end = end // cols * cols
        if whole_begin >= whole_end and begin // cols == (end - 1) // cols:
            bounds = [begin, end]  # within one row
        else:
            bounds = sorted({begin, whole_begin, whole_end, end})
        for a, b in itertools.pairwise(bounds):
            row, col = divmod(a, cols)
            height = max(1, (b - a) // cols)
            part_row = segment.part_start + row - segment.start
            found.append(Rectangle(segment.part, part_row, first + col, height, (b - a) // height, a - start, counts))
    return found


def counted_intervals(spec: ParameterSpec, coordinates: Coordinates, start: int, length: int) -> list[tuple[int, int]]:
    """Return the pieces of an interval that count in a sum over processes: of several copies, only the first counts.

    The interval is elements [start, start + length) of a process's flattened shard. Each piece is (start, length), and
    its start is relative to the beginning of the interval. If a parameter is compact (:attr:`ParameterSpec.compact`),
    its shard can end with unused rows, which are zero. These are counted if every used row of the shard is counted, and
    left out otherwise. If a parameter is not compact, padding is treated like any other row.
    """
    cols = spec.local_cols(coordinates)[1]
    if spec.compact:  # a compact parameter stores only the rows of its segments
        pairs = zip(spec.local_segments(coordinates), spec.counted_segments(coordinates), strict=True)
        rows = [(segment.start, segment.length, counts) for segment, counts in pairs]
        if all(counts for _, _, counts in rows):
            # Unused rows are zero. Including them keeps the order of additions the same as for other specs.
            return [(0, length)]
    else:
        rows = [(each.local, each.length, each.counted) for each in spec.row_intervals(coordinates)]
    found: list[tuple[int, int]] = []
    for row, height, counts in rows:
        begin, end = max(start, row * cols), min(start + length, (row + height) * cols)
        if not counts or begin >= end:
            continue
        if found and sum(found[-1]) == begin - start:
            begin = found.pop()[0] + start
        found.append((begin - start, end - begin))
    return found


@dataclass(frozen=True)
class Box:
    """Elements [offsets, offsets + sizes) of a tensor of any number of dimensions."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    """Position of the box's first element in the rectangle, in which the box's elements are contiguous."""


def boxes(shape: Sequence[int], rectangle: Rectangle) -> Iterator[Box]:
    """Yield the boxes that make up a rectangle of a logical tensor of shape `shape`. If the tensor has one or two
    dimensions, there is one box."""
    if len(shape) == 1:
        yield Box((rectangle.row,), (rectangle.height,), 0)
        return
    start = 0
    for offsets, sizes in _leading(tuple(shape[:-1]), rectangle.row, rectangle.height):
        yield Box((*offsets, rectangle.col), (*sizes, rectangle.width), start)
        start += math.prod(sizes) * rectangle.width


def _leading(dims: tuple[int, ...], start: int, length: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of the boxes that hold flat indices [start, start + length) of a tensor [dims]."""
    if len(dims) == 1:
        yield (start,), (length,)
        return
    inner = math.prod(dims[1:])
    stop = start + length
    while start < stop:
        index, rest = divmod(start, inner)
        whole = (stop - start) // inner
        if rest == 0 and whole:
            yield (index, *([0] * (len(dims) - 1))), (whole, *dims[1:])
            start += whole * inner
        else:
            taken = min(inner - rest, stop - start)
            for offsets, sizes in _leading(dims[1:], rest, taken):
                yield (index, *offsets), (1, *sizes)
            start += taken
