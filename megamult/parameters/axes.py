"""Named axes of the process grid, and the coordinates of a process. The module does not use torch.distributed.

The axes and their order are those of Megatron-Core. Ranks that differ only in their tensor-parallel coordinate are
consecutive; ranks that differ only in their pipeline coordinate lie furthest apart. The context, expert and pipeline
axes are named here, but this version trains only with size 1 along them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Axis = Literal["tensor", "context", "expert", "data", "pipeline"]

AXES: tuple[Axis, ...] = get_args(Axis)
"""All axes. Neighbours along the first axis have consecutive ranks; neighbours along the last lie furthest apart."""

MODEL_AXES: tuple[Axis, ...] = ("tensor", "context", "expert")
"""Axes along which a spec says whether a parameter is sharded or replicated. The data axis is not one of them, because
ZeRO cuts parameters over it; nor is the pipeline axis, because each pipeline stage has its own parameters."""


@dataclass(frozen=True)
class Grid:
    """Number of processes along each axis.

    Raises:
        ValueError: a size is below 1.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size_of(axis) < 1:
                raise ValueError(f"the grid's size along {axis} is {self.size_of(axis)}: it must be at least 1")

    def size_of(self, axis: Axis) -> int:
        """Return the number of processes along an axis."""
        size: int = getattr(self, axis)
        return size

    @property
    def size(self) -> int:
        """Number of all processes."""
        return math.prod(self.size_of(axis) for axis in AXES)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of the process that has this global rank."""
        found: dict[str, int] = {}
        for axis in AXES:
            rank, found[axis] = divmod(rank, self.size_of(axis))
        return Coordinates(self, **found)

    def shards(self) -> Iterator[Coordinates]:
        """Yield the coordinates of one process for each shard of a parameter, in the order of the processes' ranks.

        There is a shard for each combination of tensor, context and expert coordinates. The process is the one whose
        data and pipeline coordinates are 0."""
        for rank in range(self.size):
            found = self.coordinates(rank)
            if found.data == found.pipeline == 0:
                yield found


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of one process in a grid: its rank along each axis."""

    grid: Grid
    tensor: int = 0
    context: int = 0
    expert: int = 0
    data: int = 0
    pipeline: int = 0

    def on(self, axis: Axis) -> tuple[int, int]:
        """Return (rank of this process along an axis, number of processes along that axis)."""
        return getattr(self, axis), self.grid.size_of(axis)

    @property
    def rank(self) -> int:
        """Global rank of the process."""
        rank = 0
        for axis in reversed(AXES):
            own, size = self.on(axis)
            rank = rank * size + own
        return rank


def tensor_shard(rank: int, size: int) -> Coordinates:
    """Return the coordinates of a process in a grid that has only a tensor-parallel axis."""
    return Coordinates(Grid(tensor=size), tensor=rank)
