"""A flat interval of a tensor-parallel shard, seen as rectangles of the logical tensors that it holds.

ZeRO cuts parameters into flat intervals; Muon and everything else that works on logical matrices (Q, K, V, gate,
up ...) needs to know where the elements of an interval belong.

Pure: no torch.distributed, testable for any number of ranks in one process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megamult.parameters.spec import ParameterSpec


@dataclass(frozen=True)
class Rectangle:
    """Elements [row, row + height) x [col, col + width) of a logical tensor (a vector has one column).

    In the interval they lie contiguously, row by row, from `offset`.
    """

    part: int
    row: int
    col: int
    height: int
    width: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.height * self.width


def rectangles(spec: ParameterSpec, tp_rank: int, tp_size: int, start: int, length: int) -> list[Rectangle]:
    """The logical content of elements [start, start + length) of the flattened shard of one tensor-parallel rank.

    Args:
        layout: of the parameter.
        tp_rank, tp_size: whose shard.
        start, length: in elements of the flattened shard.

    Returns:
        Rectangles in the order of their offsets; at most three per run of rows (the rest of a row, whole rows, the
        beginning of a row). Padding is part of none.
    """
    first, cols = spec.local_columns(tp_rank, tp_size) if len(spec.shape) == 2 else (0, 1)
    found: list[Rectangle] = []

    def add(run_row: int, part: int, part_row: int, begin: int, end: int) -> None:
        row, col = divmod(begin, cols)
        height = max(1, (end - begin) // cols)
        width = (end - begin) // height
        found.append(Rectangle(part, part_row + row - run_row, first + col, height, width, begin - start))

    for run in spec.local_segments(tp_rank, tp_size):
        begin = max(start, run.start * cols)
        end = min(start + length, (run.start + run.length) * cols)
        if begin >= end:
            continue
        whole_begin = -(-begin // cols) * cols
        whole_end = end // cols * cols
        if whole_begin >= whole_end and begin // cols == (end - 1) // cols:
            bounds = [begin, end]  # within one row
        else:
            bounds = sorted({begin, whole_begin, whole_end, end})
        for a, b in itertools.pairwise(bounds):
            add(run.start, run.part, run.part_start, a, b)
    return found
