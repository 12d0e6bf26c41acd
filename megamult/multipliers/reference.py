"""The mathematics of multipliers in plain form, for any dtype: the reference that tests compare with.

Notation of arXiv 2601.04890, equation 4: W[out, in] is the weight, G = dL/dW_eff[out, in] is the gradient of the
effective weight, and r[out], c[in] and s[] are the row, column and scalar multipliers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients dL/dW[out, in], dL/dr[out], dL/dc[in], dL/ds[]."""

    weight: Tensor
    row: Tensor
    col: Tensor
    scalar: Tensor


def effective_weight(
    weight: Tensor, row: Tensor | None = None, col: Tensor | None = None, scalar: Tensor | None = None
) -> Tensor:
    """Return W_eff = s diag(r) W diag(c), [out, in]. A multiplier that is None counts as 1."""
    effective = weight
    if row is not None:
        effective = effective * row[:, None]
    if col is not None:
        effective = effective * col[None, :]
    if scalar is not None:
        effective = effective * scalar.reshape(())
    return effective


def gradients(
    grad: Tensor,
    weight: Tensor,
    row: Tensor | None = None,
    col: Tensor | None = None,
    scalar: Tensor | None = None,
) -> Gradients:
    """Return the four gradients by the chain rule (equation 4). `grad` is G, and all four are linear in it."""
    r = torch.ones(weight.shape[0], dtype=weight.dtype) if row is None else row
    c = torch.ones(weight.shape[1], dtype=weight.dtype) if col is None else col
    s = torch.ones((), dtype=weight.dtype) if scalar is None else scalar.reshape(())
    return Gradients(
        weight=s * torch.einsum("i,j,ij->ij", r, c, grad),
        row=s * torch.einsum("ij,j,ij->i", weight, c, grad),
        col=s * torch.einsum("i,ij,ij->j", r, weight, grad),
        scalar=torch.einsum("i,ij,j,ij->", r, weight, c, grad),
    )
