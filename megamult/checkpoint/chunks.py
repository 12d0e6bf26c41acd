"""Chunk: a rectangle of a named tensor, the unit in which checkpoints are written and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """The rectangle [offsets, offsets + sizes) of a tensor of global `shape`."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], Tensor] = field(repr=False, compare=False)
    """Function that returns the chunk's values, a tensor of shape `sizes`: a view of live memory, or values that the
    function reads from a file."""
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def holding(self, values: Tensor) -> Chunk:
        """Return a chunk of the same rectangle with other values."""
        return dataclasses.replace(self, load=lambda: values)

    @staticmethod
    def of(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], values: Tensor) -> Chunk:
        """Return the chunk at `offsets` that has the values `values`."""
        return Chunk(name, shape, offsets, tuple(values.shape), lambda: values, values.dtype)

    @staticmethod
    def whole(name: str, values: Tensor) -> Chunk:
        """Return a chunk that is a whole tensor."""
        return Chunk.of(name, tuple(values.shape), (0,) * values.ndim, values)
