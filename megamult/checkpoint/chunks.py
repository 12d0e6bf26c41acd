"""A rectangle of a named tensor: the unit that checkpoints are written and read in."""

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
    """Gives its values, a tensor of `sizes`: a view of live memory, or read from elsewhere when it is asked for."""
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def holding(self, values: Tensor) -> Chunk:
        """The same rectangle, of which these are the values."""
        return dataclasses.replace(self, load=lambda: values)

    @staticmethod
    def of(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], values: Tensor) -> Chunk:
        """The rectangle at `offsets` that has these values."""
        return Chunk(name, shape, offsets, tuple(values.shape), lambda: values, values.dtype)

    @staticmethod
    def whole(name: str, values: Tensor) -> Chunk:
        """All of a tensor."""
        return Chunk.of(name, tuple(values.shape), (0,) * values.ndim, values)
