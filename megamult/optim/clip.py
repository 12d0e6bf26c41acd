"""Gradient norms of a sharded model, with each gradient element counted once, and clip factors from these norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.multipliers.config import MultiplierClip
from megamult.optim.rates import Rates, runs_of_slice
from megamult.parameters.rectangles import rectangles
from megamult.zero.partition import Partition, Slice


@dataclass(frozen=True)
class Norms:
    """L2 norms of the reduced gradient before clipping."""

    main: float
    """Norm over all parameters except multipliers."""
    multipliers: float
    """Norm over the multipliers."""

    @property
    def joint(self) -> float:
        """Norm over all parameters."""
        return math.hypot(self.main, self.multipliers)

    @property
    def finite(self) -> bool:
        """Whether no gradient element is infinite or NaN."""
        return math.isfinite(self.main) and math.isfinite(self.multipliers)


@dataclass(frozen=True)
class Clipping:
    """Rule that decides how much a step clips gradients, and whether the step is skipped."""

    threshold: float
    """Norm to which larger gradients are scaled down; 0 means no clipping. The norm is over all parameters if
    `multipliers` is `joint`, else over all parameters except multipliers. If `multipliers` is `own`, the norm over the
    multipliers has the same threshold."""
    multipliers: MultiplierClip = "out"
    skip_above: float = 0.0
    """The step is skipped if the norm that `threshold` limits is above this value; 0 means no limit."""

    def skips(self, norms: Norms) -> bool:
        """Return whether a step with these norms is skipped."""
        return not norms.finite or 0 < self.skip_above < self._limited(norms)

    def factors(self, norms: Norms) -> tuple[float, float]:
        """Return two factors: for the gradients of all parameters except multipliers, and for those of multipliers."""
        main = clip_factor(self._limited(norms), self.threshold)
        if self.multipliers == "own":
            return main, clip_factor(norms.multipliers, self.threshold)
        return main, main if self.multipliers == "joint" else 1.0

    def _limited(self, norms: Norms) -> float:
        return norms.joint if self.multipliers == "joint" else norms.main


class LocalSquares:
    """Function that returns sums of squares over gradient elements of this process.

    If several processes hold copies of an element, only one of them includes it. The sum of the results of all
    processes therefore counts each element once.

    The number of kernels that a call starts does not grow with the number of slices. A call copies nothing between the
    CPU and the device.

    Args:
        partition: the slices that this process holds.
        device: the device of the slices.
        rates: factors of learning rate and weight decay. Elements whose learning-rate factor is 0 are left out.
    """

    def __init__(self, partition: Partition, device: torch.device, rates: Rates) -> None:
        self._counted = [
            (i, start, length)
            for i, piece in enumerate(partition.slices)
            for start, length in _changing(piece, partition, rates)
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


def _changing(piece: Slice, partition: Partition, rates: Rates) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of each interval of a slice that gradient norms include.

    Norms leave out elements whose learning-rate factor is 0. Of an element that several processes hold, they include
    one copy (:meth:`Partition.counted`). Of a vector that is stored once for each part (`ParameterSpec.shared`), they
    include only the first part.
    """
    runs = runs_of_slice(piece, partition, rates)
    changing = [(run.start, run.stop) for run in runs if run.rate.lr != 0]
    if piece.spec.shared:
        held = rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length)
        firsts = [(r.offset, r.offset + r.numel) for r in held if r.part == 0]
        changing = firsts if changing else []  # all parts have the same rate
    elif len(changing) == len(runs):
        yield from partition.counted(piece)
        return
    for first, length in partition.counted(piece):
        for begin, end in changing:
            start, stop = max(first, begin), min(first + length, end)
            if start < stop:
                yield start, stop - start


def clip_factor(norm: float, threshold: float) -> float:
    """Return the factor that brings a norm down to `threshold`; 1 if the norm is below it, or if the threshold is 0."""
    if threshold <= 0:
        return 1.0
    return min(1.0, threshold / (norm + 1e-6))
