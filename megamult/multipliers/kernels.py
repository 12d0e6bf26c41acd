"""Scaling rows of a weight by their multipliers, forward and backward, in as few passes as the device allows.

W_eff[i, j] = rho[i] kappa[m(i), j] W[i, j], where rho[out] joins row multipliers and scalars, kappa[vectors, in]
holds one column vector per logical matrix and m(i) is the matrix that row i belongs to. The rows of one matrix
come as :class:`Span`s. On CUDA each function is one compiled kernel (plus one skinny product); on a CPU, where
compiling would take longer than a test, rows are processed in blocks that stay in the cache.

Both functions serve the weights of layers and, with `piece`, the bands of a partition's slices
(:mod:`megamult.multipliers.scaling`). The effective weight of a layer is a new tensor, and kernels are compiled for its
shape. Bands are fp32, are scaled in place and come in every shape: one compiled kernel serves them all, and a small one
is not worth its call.

Both forms are tested against `megamult.multipliers.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows [start, stop) of the weight, scaled by row `col` of kappa (None: no column multipliers)."""

    start: int
    stop: int
    col: int | None


def scale(
    weight: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...], *, piece: bool = False
) -> Tensor:
    """Return W_eff[out, in] in the weight's dtype, computed in fp32 or wider and rounded once.

    Args:
        weight: W[out, in].
        rho: [out]; None: ones.
        kappa: [vectors, in]; None: ones.
        spans: which rows each vector scales; they cover all rows, in order.
        piece: whether the weight is a band of a slice, to be scaled in place and returned.
    """
    if _compiled(weight, spans, piece):
        if piece:
            _scale_piece_compiled(weight, *_whole(weight, rho, kappa, spans))
            return weight
        return _scale_compiled(weight.detach(), *_detached(rho, kappa, spans))
    dtype = _computed_in(weight)
    rho, kappa = _in(dtype, rho), _in(dtype, kappa)
    effective = weight if piece else torch.empty_like(weight)
    for block in _blocks(spans, weight.shape[1]):
        source = weight[block.start : block.stop]
        target = source if piece else effective[block.start : block.stop]
        made = target if dtype == weight.dtype else torch.empty_like(target, dtype=dtype)
        if kappa is not None and block.col is not None:
            source = torch.mul(source, kappa[block.col], out=made)
        if rho is not None:
            source = torch.mul(source, rho[block.start : block.stop, None], out=made)
        if source is not target:
            target.copy_(source)
    return effective


def scale_backward(
    grad: Tensor,
    weight: Tensor,
    rho: Tensor | None,
    kappa: Tensor | None,
    spans: tuple[Span, ...],
    *,
    row: bool,
    col: bool,
    piece: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Turn grad [out, in], dL/dW_eff, into dL/dW in place, and return the multipliers' gradients in fp32.

    Args:
        grad: overwritten.
        weight: W[out, in] before :func:`scale`, not changed.
        rho, kappa, spans, piece: the same as for :func:`scale`.
        row, col: whether to compute the first and the second result.

    Returns:
        sum_j W kappa G [out] if `row`, else None; and if `col`, for each row of kappa, sum_i rho W G [vectors, in],
        else None (on CUDA a matrix product, as precise as the weight's dtype, in TF32 where torch is told to allow it).
    """
    if _compiled(weight, spans, piece):
        back = _backward_piece_compiled if piece else _backward_compiled
        factors = _whole(weight, rho, kappa, spans) if piece else _detached(rho, kappa, spans)
        dots, products = back(grad, weight.detach(), *factors)
        if not col or kappa is None:
            return dots if row else None, None
        assert products is not None
        members = _members(spans, weight.shape[0], kappa.shape[0], weight.device, products.dtype)
        return dots if row else None, (members @ products).float()
    dtype = _computed_in(weight)
    rho, kappa = _in(dtype, rho), _in(dtype, kappa)
    row_sum = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device) if row else None
    col_sum = torch.zeros_like(kappa, dtype=torch.float32) if col and kappa is not None else None
    for block in _blocks(spans, weight.shape[1]):
        here = slice(block.start, block.stop)
        r = None if rho is None else rho[here]
        c = None if kappa is None or block.col is None else kappa[block.col]
        g = grad[here].to(dtype)  # a view, unless the gradient is narrower
        if row_sum is not None or col_sum is not None:
            h = g * weight[here]
            if row_sum is not None:
                row_sum[here] = h.sum(1) if c is None else torch.mv(h, c)
            if col_sum is not None and block.col is not None:
                col_sum[block.col] += h.sum(0) if r is None else torch.mv(h.t(), r)
        if c is not None:
            g.mul_(c)
        if r is not None:
            g.mul_(r[:, None])
        if grad.dtype != dtype:
            grad[here] = g
    return row_sum, col_sum


_BLOCK_ELEMENTS = 1 << 20  # elements of a CPU block: they fit the last-level cache and outweigh the cost of a call


def _blocks(spans: tuple[Span, ...], columns: int) -> list[Span]:
    rows = max(1, _BLOCK_ELEMENTS // columns)
    return [
        Span(start, min(start + rows, span.stop), span.col)
        for span in spans
        for start in range(span.start, span.stop, rows)
    ]


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype to scale a weight in: its own, or fp32 where that is narrower, with one rounding at the end."""
    return torch.promote_types(weight.dtype, torch.float32)


def _in(dtype: torch.dtype, factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.to(dtype)


_Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""rho [rows]; kappa, with a row of ones at its end if any row needs it; and for each row the index of the row of kappa
that scales it, [rows]."""


def _compiled(weight: Tensor, spans: tuple[Span, ...], piece: bool) -> bool:
    """Return whether to call a compiled kernel: on CUDA, except for a small band of one span, such as one row, where
    two or three plain calls cost less."""
    return weight.is_cuda and (not piece or weight.numel() >= 1 << 16 or len(spans) > 1)


def _detached(rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> _Factors:
    """Return the factors for the kernels of layers, detached: the compiler would make one kernel for a Parameter and
    another for the same plain tensor."""
    rho = None if rho is None else rho.detach()
    if kappa is None:
        return rho, None, None
    kappa = kappa.detach()
    if any(span.col is None for span in spans):
        kappa = torch.cat([kappa, torch.ones_like(kappa[:1])])
    return rho, kappa, _rows_to_cols(spans, spans[-1].stop, kappa.device)


def _whole(matrix: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> _Factors:
    """Return the factors for the kernels of bands, with ones for missing multipliers, so that one kernel serves all
    placements: every further kernel counts towards torch's limit of compilations, after which functions run
    uncompiled."""
    rows, cols = matrix.shape
    rho = matrix.new_ones(rows) if rho is None else rho
    if kappa is None:
        return rho, matrix.new_ones(2, cols), _rows_to_cols(spans, rows, matrix.device)
    return _detached(rho, kappa, spans)


def _rows_to_cols(spans: tuple[Span, ...], rows: int, device: torch.device) -> Tensor:
    """Return for each row the index of the row of kappa that scales it, [rows]; -1: the row of ones after the last."""
    key = (spans, rows, device)
    if key not in _INDICES:
        index = torch.empty(rows, dtype=torch.long)
        for span in spans:
            index[span.start : span.stop] = -1 if span.col is None else span.col
        _INDICES[key] = index.to(device)
    return _INDICES[key]


def _members(spans: tuple[Span, ...], rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return [cols, rows]: 1 where a row of kappa scales a row of the weight, else 0; kappa has `cols` rows."""
    key = (spans, rows, cols, device, dtype)
    if key not in _MEMBERS:
        index = _rows_to_cols(spans, rows, device)
        _MEMBERS[key] = (index == torch.arange(cols, device=device)[:, None]).to(dtype)
    return _MEMBERS[key]


_INDICES: dict[tuple[tuple[Span, ...], int, torch.device], Tensor] = {}
_MEMBERS: dict[tuple[tuple[Span, ...], int, int, torch.device, torch.dtype], Tensor] = {}


def _scaled(weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None) -> Tensor:
    effective = weight.float()
    if kappa is not None:
        effective = effective * kappa.float()[index]
    if rho is not None:
        effective = effective * rho.float()[:, None]
    return effective.to(weight.dtype)


def _backward(
    grad: Tensor, weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Turn grad into dL/dW; return sum_j W kappa G, and rho W G, which the caller sums over rows (None: no kappa)."""
    g = grad.float()
    h = g * weight.float()
    products = None
    if kappa is None:
        row_sum = h.sum(1)
    else:
        factor = kappa.float()[index]
        row_sum = (h * factor).sum(1)
        products = (h if rho is None else h * rho.float()[:, None]).to(weight.dtype)
        g = g * factor
    if rho is not None:
        g = g * rho.float()[:, None]
    grad.copy_(g)
    return row_sum, products


def _scale_piece(weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None) -> None:
    # One tensor, changed in place: given two views of one buffer, a compiled function keeps using the offset that it
    # saw in its first call.
    weight.copy_(_scaled(weight, rho, kappa, index))


def _backward_piece(
    grad: Tensor, weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    # A function of its own: torch counts compilations by function, and those of layers are many.
    return _backward(grad, weight, rho, kappa, index)


_scale_compiled = torch.compile(_scaled, dynamic=False)
_backward_compiled = torch.compile(_backward, dynamic=False)
_scale_piece_compiled = torch.compile(_scale_piece, dynamic=True)
_backward_piece_compiled = torch.compile(_backward_piece, dynamic=True)
