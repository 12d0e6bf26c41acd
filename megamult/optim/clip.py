"""Gradient norms over a sharded model, each element counted once, and the factors that clip by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.zero.slices import Slice


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


def local_squares(slices: Sequence[Slice], gradients: Sequence[Tensor], tp_rank: int) -> Tensor:
    """[2], fp64: this rank's sums of squares, (all but multipliers, multipliers). Replicas count on TP rank 0."""
    totals = torch.zeros(2, dtype=torch.float64)
    if not slices:
        return totals
    counted = [i for i, piece in enumerate(slices) if piece.layout.counted_on(tp_rank)]
    norms = [torch.linalg.vector_norm(gradients[i], dtype=torch.float32) for i in counted]
    if norms:
        squares = torch.stack(norms).double().square()
        is_multiplier = torch.tensor([slices[i].layout.kind == "multiplier" for i in counted], device=squares.device)
        zero = squares.new_zeros(())
        totals = torch.stack(
            [torch.where(is_multiplier, zero, squares).sum(), torch.where(is_multiplier, squares, zero).sum()]
        )
    return totals


def clip_factor(norm: float, threshold: float) -> float:
    """What to scale gradients by so that their norm is at most `threshold` (0: never scale)."""
    if threshold <= 0:
        return 1.0
    return min(1.0, threshold / (norm + 1e-6))
