"""Scaling a local weight by its multipliers, forward and backward, in as few passes as the device allows.

W_eff[i, j] = rho[i] kappa[m(i), j] W[i, j], where rho[out] joins row multipliers and scalars, kappa[parts, in]
holds one column vector per logical matrix and m(i) is the matrix that row i belongs to. The rows of one matrix
come as :class:`Span`s. On CUDA each function is one compiled kernel (plus one skinny product); on a CPU, where
compiling would take longer than a test, rows are processed in blocks that stay in the cache. Slices of a partition
have functions of their own, which work in place and whose compiled form serves slices of every shape.

Both forms are tested against `megamult.multipliers.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows [start, stop) of the local weight, scaled by row `col` of kappa (None: no column multipliers)."""

    start: int
    stop: int
    col: int | None


@dataclass(frozen=True)
class Backward:
    """Gradients through a scaled weight: dL/dW[out, in]; row_dot[out] = sum_j W kappa G, in fp32; dL/dkappa[parts, in],
    in fp32 (on CUDA only as precise as the weight's dtype)."""

    weight: Tensor
    row_dot: Tensor | None
    col: Tensor | None


_BLOCK_ELEMENTS = 1 << 20  # elements of a CPU block: they fit the last-level cache and outweigh the cost of a call


def _blocks(spans: tuple[Span, ...], columns: int) -> list[Span]:
    rows = max(1, _BLOCK_ELEMENTS // columns)
    return [
        Span(start, min(start + rows, span.stop), span.col)
        for span in spans
        for start in range(span.start, span.stop, rows)
    ]


def scale(weight: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> Tensor:
    """Return W_eff[out, in] in the weight's dtype, from W[out, in], rho[out] and kappa[parts, in]; one of rho and kappa
    may be None, which counts as all ones."""
    if weight.is_cuda:
        index = _rows_to_cols(spans, weight.shape[0], weight.device) if kappa is not None else None
        # Detached, or the compiler would make one kernel for a Parameter and another for the same plain tensor.
        return _scale_compiled(weight.detach(), _detached(rho), _detached(kappa), index)
    dtype = _computed_in(weight)
    rho, kappa = _in(dtype, rho), _in(dtype, kappa)
    if kappa is None and dtype == weight.dtype:
        assert rho is not None
        return weight * rho[:, None]
    effective = torch.empty_like(weight)
    for block in _blocks(spans, weight.shape[1]):
        target, source = effective[block.start : block.stop], weight[block.start : block.stop]
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
    needs_row_dot: bool,
) -> Backward:
    """Return the gradients of :func:`scale` from grad = dL/dW_eff[out, in], which is overwritten."""
    if weight.is_cuda:
        return _scale_backward_compiled(grad, weight, rho, kappa, spans, needs_row_dot)
    row, col = scale_rows_backward(grad, weight, rho, kappa, spans, row=needs_row_dot, col=kappa is not None)
    return Backward(grad, row, col)


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype to scale a weight in: its own, or fp32 where that is narrower, with one rounding at the end."""
    return torch.promote_types(weight.dtype, torch.float32)


def _in(dtype: torch.dtype, factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.to(dtype)


# ---- in place ------------------------------------------------------------------------------------------------


def scale_rows(weight: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> None:
    """Scale W[rows, cols] in place, as :func:`scale` does, by rho[rows] and kappa[parts, cols]; None: all ones."""
    if _worth_compiling(weight, spans):
        _scale_rows_compiled(weight, *_given(weight, rho, kappa, spans))
        return
    for block in _blocks(spans, weight.shape[1]):
        rows = weight[block.start : block.stop]
        if kappa is not None and block.col is not None:
            rows.mul_(kappa[block.col])
        if rho is not None:
            rows.mul_(rho[block.start : block.stop, None])


def scale_rows_backward(
    grad: Tensor,
    weight: Tensor,
    rho: Tensor | None,
    kappa: Tensor | None,
    spans: tuple[Span, ...],
    *,
    row: bool,
    col: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Turn grad [rows, cols], dL/dW_eff for the scaled weight, into dL/dW in place; return the multipliers' gradients.

    Args:
        grad: overwritten.
        weight: W[rows, cols] before :func:`scale_rows`, not changed.
        rho, kappa, spans: the same as for :func:`scale_rows`.
        row, col: whether to compute the first and the second result.

    Returns:
        sum_j W kappa G [rows] if `row`, else None; and if `col`, for each row of kappa, sum_i rho W G [parts, cols],
        else None (on CUDA a matrix product, in TF32 where torch is told to allow it).
    """
    rows, device = weight.shape[0], weight.device
    if _worth_compiling(grad, spans):
        dots, scaled = _scale_rows_backward_compiled(grad, weight, *_given(grad, rho, kappa, spans))
        if not col or kappa is None:
            return dots if row else None, None
        return dots if row else None, _members(spans, rows, kappa.shape[0], device, scaled.dtype) @ scaled
    dtype = _computed_in(weight)
    rho, kappa = _in(dtype, rho), _in(dtype, kappa)
    row_sum = torch.empty(rows, dtype=torch.float32, device=device) if row else None
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


# ---- CUDA ----------------------------------------------------------------------------------------------------


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


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _with_ones(kappa: Tensor) -> Tensor:
    return torch.cat([kappa, torch.ones_like(kappa[:1])])


def _worth_compiling(tensor: Tensor, spans: tuple[Span, ...]) -> bool:
    """Return whether one compiled call costs less than a call per span: not for a small piece, such as one row."""
    return tensor.is_cuda and (tensor.numel() >= 1 << 16 or len(spans) > 1)


def _given(
    matrix: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rho [rows], kappa (with a row of ones at its end if any row needs it), and for each row the index of the
    row of kappa that scales it.

    Missing multipliers become ones, so that one kernel serves all placements: every further kernel counts towards
    torch's limit of compilations, after which functions run uncompiled.
    """
    rows, cols = matrix.shape
    rho = matrix.new_ones(rows) if rho is None else rho
    if kappa is None:
        kappa = matrix.new_ones(2, cols)
    elif any(span.col is None for span in spans):
        kappa = _with_ones(kappa)
    return rho, kappa, _rows_to_cols(spans, rows, matrix.device)


def _scale_rows_fused(weight: Tensor, rho: Tensor, kappa: Tensor, index: Tensor) -> None:
    # One tensor, changed in place: given two views of one buffer, a compiled function keeps using the offset that it
    # saw in its first call.
    weight.mul_(kappa[index]).mul_(rho[:, None])


def _scale_rows_backward_fused(
    grad: Tensor, weight: Tensor, rho: Tensor, kappa: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    h, factor = grad * weight, kappa[index]
    row_sum, scaled = (h * factor).sum(1), h * rho[:, None]
    grad.mul_(factor).mul_(rho[:, None])
    return row_sum, scaled


_scale_rows_compiled = torch.compile(_scale_rows_fused, dynamic=True)
_scale_rows_backward_compiled = torch.compile(_scale_rows_backward_fused, dynamic=True)


@torch.compile(dynamic=False)
def _scale_compiled(weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None) -> Tensor:
    effective = weight.float()
    if kappa is not None:
        assert index is not None
        effective = effective * _with_ones(kappa).float()[index]
    if rho is not None:
        effective = effective * rho.float()[:, None]
    return effective.to(weight.dtype)


@torch.compile(dynamic=False)
def _products_compiled(
    grad: Tensor, weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dW, sum_j W kappa G, and rho W G, which the caller sums over rows."""
    g, h = grad.float(), grad.float() * weight.float()
    scaled = h
    if kappa is not None:
        assert index is not None
        factor = _with_ones(kappa).float()[index]
        scaled, g = scaled * factor, g * factor
    if rho is not None:
        g, h = g * rho.float()[:, None], h * rho.float()[:, None]
    return g.to(grad.dtype), scaled.sum(1), h.to(grad.dtype)


def _scale_backward_compiled(
    grad: Tensor,
    weight: Tensor,
    rho: Tensor | None,
    kappa: Tensor | None,
    spans: tuple[Span, ...],
    needs_row_dot: bool,
) -> Backward:
    rows, device = weight.shape[0], weight.device
    index = _rows_to_cols(spans, rows, device) if kappa is not None else None
    grad_weight, row_dot, h = _products_compiled(grad, weight, rho, kappa, index)
    col = None
    if kappa is not None:
        col = (_members(spans, rows, kappa.shape[0], device, h.dtype) @ h).float()
    return Backward(grad_weight, row_dot if needs_row_dot else None, col)
