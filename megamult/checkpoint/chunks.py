"""A rectangle of a named tensor: the unit that checkpoints are written and read in."""

from __future__ import annotations

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
    def key(self) -> str:
        """Its name in a file: unique in a checkpoint."""
        return f"{self.name}@{','.join(map(str, self.offsets))}"

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    @staticmethod
    def whole(name: str, tensor: Tensor) -> Chunk:
        """All of a tensor."""
        shape = tuple(tensor.shape)
        return Chunk(name, shape, (0,) * len(shape), shape, lambda: tensor, tensor.dtype)
