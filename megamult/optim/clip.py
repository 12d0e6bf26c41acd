"""Gradient norms over a sharded model, each element counted once, and the factors that clip by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.zero.partition import Slice


@dataclass(frozen=True)
class Norms:
    """l2 norms of the reduced gradient before clipping."""

    main: float
    """Everything but multipliers."""
    multipliers: float

    @property
    def finite(self) -> bool:
        """Whether no gradient element is infinite or NaN."""
        return math.isfinite(self.main) and math.isfinite(self.multipliers)


class LocalSquares:
    """Sums of squares of the gradients of a partition, each element of the model counted once over tensor-parallel
    ranks (replicas count on rank 0). However many slices there are, a call takes a few kernels, and no copy between the
    CPU and the device.

    Args:
        slices: of the partition.
        tp_rank: of this process.
        device: of the slices.
    """

    def __init__(self, slices: Sequence[Slice], tp_rank: int, device: torch.device) -> None:
        self._counted = [i for i, piece in enumerate(slices) if piece.spec.counted_on(tp_rank)]
        of_multipliers = [slices[i].spec.kind == "multiplier" for i in self._counted]
        self._of_multipliers = torch.tensor(of_multipliers, dtype=torch.bool, device=device)

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """[2], fp64: (all but multipliers, multipliers).

        Args:
            gradients: of each slice.
        """
        if not self._counted:
            return torch.zeros(2, dtype=torch.float64, device=self._of_multipliers.device)
        norms = torch._foreach_norm([gradients[i] for i in self._counted], dtype=torch.float32)
        squares = torch.stack(norms).double().square()
        zero = squares.new_zeros(())
        mask = self._of_multipliers
        return torch.stack([torch.where(mask, zero, squares).sum(), torch.where(mask, squares, zero).sum()])


def clip_factor(norm: float, threshold: float) -> float:
    """What to scale gradients by so that their norm is at most `threshold` (0: never scale)."""
    if threshold <= 0:
        return 1.0
    return min(1.0, threshold / (norm + 1e-6))
