"""Sums of squares of the rows and columns of matrices whose blocks lie on several processes, and figures from them.

The sum of squares of a row or a column is the sum over the blocks that the row or column crosses. Each process adds the
squares of the elements that it holds, and one sum over all processes gives the squared norm of every row and column of
every matrix. RMS and spread follow from these norms, and are therefore the same for every sharding.

Pure functions, without I/O or communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Squares(NamedTuple):
    """Sums of squares of each row and each column of one block of a matrix W, and of the same block of W_eff.

    The effective weight W_eff is diag(rho) W diag(kappa), where rho is the row multipliers times the scalar, and kappa
    the column multipliers.
    """

    rows: Tensor
    """Sum over the columns of the block for each row, [height]."""
    cols: Tensor
    """Sum over the rows of the block for each column, [width]."""
    effective_rows: Tensor | None
    """The same as `rows` for diag(rho) W diag(kappa), or None if W has no multipliers."""
    effective_cols: Tensor | None
    """The same as `cols` for diag(rho) W diag(kappa), or None if W has no multipliers."""


def squares_of(block: Tensor, rho: Tensor | None, kappa: Tensor | None) -> Squares:
    """Return the sum of squares of each row and of each column of a block of W, in fp32.

    If W has multipliers, also return those of the same block of W_eff = diag(rho) W diag(kappa). They are products of
    the elementwise square W * W with vectors: the sum of row i is rho_i^2 ((W * W) kappa^2)_i. So W_eff itself is not
    computed.

    Args:
        block: [height, width] block of W.
        rho: [height] product of row multiplier and scalar of each row, or None if there are neither.
        kappa: [width] column multipliers, or None if there are none.
    """
    square = block.float().square()
    rows, cols = square.sum(1), square.sum(0)
    if rho is None and kappa is None:
        return Squares(rows, cols, None, None)
    over_cols = rows if kappa is None else square @ kappa.square()
    over_rows = cols if rho is None else rho.square() @ square
    return Squares(
        rows,
        cols,
        over_cols if rho is None else over_cols * rho.square(),
        over_rows if kappa is None else over_rows * kappa.square(),
    )


def totals(values: Tensor, lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Divide `values` into consecutive intervals, and return (sum of the values, sum of their square roots) of each.

    Args:
        values: [sum of lengths] sums of squares.
        lengths: length of each interval.
    """
    wide = values.double()
    index = torch.repeat_interleave(torch.tensor(lengths, device=values.device))
    nothing = wide.new_zeros(len(lengths))
    sums = [nothing.index_add(0, index, each) for each in (wide, wide.sqrt())]
    return [(total, roots) for total, roots in torch.stack(sums, 1).tolist()]


def rms(total: float, count: int) -> float:
    """Return the root mean square of `count` elements whose squares sum to `total`."""
    return math.sqrt(total / count)


def pooled_rms(members: Sequence[tuple[float, int]]) -> float:
    """Return the root mean square of all elements of some tensors, from (sum of squares, number of elements) of
    each."""
    return rms(sum(total for total, _ in members), sum(count for _, count in members))


def variation(total: float, roots: float, count: int) -> float:
    """Return the coefficient of variation of norms: their standard deviation divided by their mean.

    Args:
        total: sum of the squares of the norms.
        roots: sum of the norms.
        count: number of norms.

    Returns:
        The coefficient, or NaN if all norms are 0.
    """
    average = roots / count
    return math.sqrt(max(total / count - average**2, 0.0)) / average if average else math.nan
