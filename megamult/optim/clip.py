"""Norms of the gradient of a sharded model, in which each element counts once, and clip factors from these norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.zero.partition import Partition


@dataclass(frozen=True)
class Norms:
    """L2 norms of the reduced gradient before clipping."""

    main: float
    """Norm over all parameters except multipliers."""
    multipliers: float
    """Norm over the multipliers."""

    @property
    def finite(self) -> bool:
        """Whether no gradient element is infinite or NaN."""
        return math.isfinite(self.main) and math.isfinite(self.multipliers)


class LocalSquares:
    """Function that sums the squares of this process's gradients so that a sum over processes counts each element once.

    The number of kernels that a call starts does not grow with the number of slices. A call copies nothing between the
    CPU and the device.

    Args:
        partition: the slices that this process holds.
        device: the device of the slices.
    """

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self._counted = [
            (i, start, length) for i, piece in enumerate(partition.slices) for start, length in partition.counted(piece)
        ]
        of_multipliers = [partition.slices[i].spec.side is not None for i, _, _ in self._counted]
        self._of_multipliers = torch.tensor(of_multipliers, dtype=torch.bool, device=device)

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return this process's sums of squares, [2] in fp64: over all parameters except multipliers, over multipliers.

        Args:
            gradients: the gradient of each slice.
        """
        if not self._counted:
            return torch.zeros(2, dtype=torch.float64, device=self._of_multipliers.device)
        counted = [gradients[i][start : start + length] for i, start, length in self._counted]
        norms = torch._foreach_norm(counted, dtype=torch.float32)
        squares = torch.stack(norms).double().square()
        zero = squares.new_zeros(())
        mask = self._of_multipliers
        return torch.stack([torch.where(mask, zero, squares).sum(), torch.where(mask, squares, zero).sum()])


def clip_factor(norm: float, threshold: float) -> float:
    """Return the factor that brings a norm down to `threshold`; 1 if the norm is below it, or if the threshold is 0."""
    if threshold <= 0:
        return 1.0
    return min(1.0, threshold / (norm + 1e-6))
