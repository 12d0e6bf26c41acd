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
    """Function that returns its values, a tensor of `sizes`: a view of live memory, or read from a file when called."""
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def holding(self, values: Tensor) -> Chunk:
        """Return the same rectangle with these values."""
        return dataclasses.replace(self, load=lambda: values)

    @staticmethod
    def of(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], values: Tensor) -> Chunk:
        """Return the rectangle at `offsets` with these values."""
        return Chunk(name, shape, offsets, tuple(values.shape), lambda: values, values.dtype)

    @staticmethod
    def whole(name: str, values: Tensor) -> Chunk:
        """Return a whole tensor as one chunk."""
        return Chunk.of(name, tuple(values.shape), (0,) * values.ndim, values)
