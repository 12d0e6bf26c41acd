"""Axes of the process grid by name, and the coordinates of a process on them. Pure.

The axes are those of Megatron-Core, in its order: ranks that differ only in their tensor-parallel coordinate are
consecutive, those of one pipeline stage lie furthest apart. Context, expert and pipeline parallelism have their names
and their place here; a grid of this version has size 1 on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Axis = Literal["tensor", "context", "expert", "data", "pipeline"]

AXES: tuple[Axis, ...] = get_args(Axis)
"""All axes, from the one whose neighbours have consecutive ranks to the one whose neighbours lie furthest apart."""

MODEL_AXES: tuple[Axis, ...] = ("tensor", "context", "expert")
"""Axes along which a parameter is either sharded or replicated. ZeRO cuts it over `data`, and a process of another
pipeline stage has other parameters."""


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
        """Return the coordinates of the process with a global rank."""
        found: dict[str, int] = {}
        for axis in AXES:
            rank, found[axis] = divmod(rank, self.size_of(axis))
        return Coordinates(self, **found)

    def shards(self) -> Iterator[Coordinates]:
        """Yield the coordinates of every process whose coordinates on the data and pipeline axes are 0: one for each
        shard of the model, in the order of their ranks."""
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
        """Return (rank, size) along an axis."""
        return getattr(self, axis), self.grid.size_of(axis)

    @property
    def rank(self) -> int:
        """Global rank."""
        rank = 0
        for axis in reversed(AXES):
            own, size = self.on(axis)
            rank = rank * size + own
        return rank


def tensor_shard(rank: int, size: int) -> Coordinates:
    """Return the coordinates of a process in a grid that has only a tensor-parallel axis."""
    return Coordinates(Grid(tensor=size), tensor=rank)
