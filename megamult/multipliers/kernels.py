"""Scaling of a weight by its multipliers, forward and backward, in as few passes as the device allows.

W_eff[i, j] = rho[i] kappa[m(i), j] W[i, j]. rho[out] is the product of row multiplier and scalar of each row,
kappa[vectors, in] holds one vector of column multipliers per logical matrix, and m(i) is the matrix that row i belongs
to. :class:`Span` says which rows belong to one matrix. On CUDA, :func:`scale` and :func:`scale_backward` each run one
compiled kernel. For the gradient of kappa, :func:`scale_backward` then sums over rows, in one product with a matrix of
zeros and ones, [vectors, out]. On a CPU nothing is compiled, because compilation would take longer than a whole test.
Instead rows are processed in blocks that stay in the cache.

Both functions scale the weights of layers or, if `piece` is True, bands: the groups of rows that folded multipliers
scale in a slice (:class:`megamult.multipliers.scaling.Band`). For a layer, the effective weight is a new tensor, and
kernels are compiled for its shape. Bands are fp32 and are scaled in place. They have many different shapes, so one
kernel of each function serves all shapes. For a small band a few plain calls are faster than this kernel.

The compiled and the plain form are tested against `megamult.multipliers.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows [start, stop) of the weight. They have the same vector of column multipliers, kappa[col], or none if `col`
    is None."""

    start: int
    stop: int
    col: int | None


def scale(
    weight: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...], *, piece: bool = False
) -> Tensor:
    """Return W_eff[out, in] in the weight's dtype, computed in fp32 or wider and rounded once.

    Args:
        weight: W[out, in].
        rho: [out], or None if all are 1.
        kappa: [vectors, in], or None if all are 1.
        spans: rows that each vector of kappa scales; together the spans cover all rows, in order.
        piece: whether the weight is a band of a slice. A band is scaled in place and returned.
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
    """Turn `grad` from dL/dW_eff into dL/dW in place, and return the gradients of rho and kappa in fp32.

    Args:
        grad: G = dL/dW_eff, [out, in]; overwritten.
        weight: W[out, in] before :func:`scale`, not changed.
        rho, kappa, spans, piece: the same as for :func:`scale`.
        row, col: whether to compute dL/drho and dL/dkappa.

    Returns:
        (dL/drho, dL/dkappa). dL/drho is sum_j W kappa G, [out], or None if not `row`. Row v of dL/dkappa,
        [vectors, in], is the sum of rho W G over the rows i of W that kappa[v] scales. dL/dkappa is None if not `col`
        or if there is no kappa. On CUDA it is a matrix product in the weight's dtype, and uses TF32 if torch is told to
        allow it.
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
        g = grad[here].to(dtype)  # a view of grad, unless the dtype of grad is narrower
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


# Elements of a block on a CPU: few enough for the last-level cache, and enough to outweigh the cost of a call.
_BLOCK_ELEMENTS = 1 << 20


def _blocks(spans: tuple[Span, ...], columns: int) -> list[Span]:
    rows = max(1, _BLOCK_ELEMENTS // columns)
    return [
        Span(start, min(start + rows, span.stop), span.col)
        for span in spans
        for start in range(span.start, span.stop, rows)
    ]


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a weight is scaled: its own dtype, or fp32 if its own is narrower."""
    return torch.promote_types(weight.dtype, torch.float32)


def _in(dtype: torch.dtype, factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.to(dtype)


_Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(rho, kappa, index). rho is [rows]. kappa is [vectors, cols], and ends with a row of ones if some row of the weight
has no column multipliers. index [rows] says which row of kappa scales each row of the weight."""


def _compiled(weight: Tensor, spans: tuple[Span, ...], piece: bool) -> bool:
    """Return whether to call a compiled kernel. On CUDA the answer is yes, unless `weight` is a small piece of a weight
    (`piece`) with only one entry in `spans`, such as a single row. Two or three uncompiled torch calls then cost
    less."""
    return weight.is_cuda and (not piece or weight.numel() >= 1 << 16 or len(spans) > 1)


def _detached(rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> _Factors:
    """Return the factors for the kernels of layers. They are detached, because the compiler would make one kernel for a
    Parameter and another for a plain tensor of the same shape."""
    rho = None if rho is None else rho.detach()
    if kappa is None:
        return rho, None, None
    kappa = kappa.detach()
    if any(span.col is None for span in spans):
        kappa = torch.cat([kappa, torch.ones_like(kappa[:1])])
    return rho, kappa, _rows_to_cols(spans, spans[-1].stop, kappa.device)


def _whole(matrix: Tensor, rho: Tensor | None, kappa: Tensor | None, spans: tuple[Span, ...]) -> _Factors:
    """Return the factors for the kernels of bands, with ones for missing multipliers.

    With ones, one kernel serves all placements. Every further kernel would count towards torch's limit of compilations,
    beyond which functions run uncompiled.
    """
    rows, cols = matrix.shape
    rho = matrix.new_ones(rows) if rho is None else rho
    if kappa is None:
        return rho, matrix.new_ones(2, cols), _rows_to_cols(spans, rows, matrix.device)
    return _detached(rho, kappa, spans)


def _rows_to_cols(spans: tuple[Span, ...], rows: int, device: torch.device) -> Tensor:
    """Return which row of kappa scales the elements of each row of the weight, [rows].

    Each row of kappa [vectors, in] is one vector of column multipliers. A row of the weight without column multipliers
    gets -1: the kernels' kappa (`_Factors`) then ends with a row of ones.
    """
    key = (spans, rows, device)
    if key not in _INDICES:
        index = torch.empty(rows, dtype=torch.long)
        for span in spans:
            index[span.start : span.stop] = -1 if span.col is None else span.col
        _INDICES[key] = index.to(device)
    return _INDICES[key]


def _members(spans: tuple[Span, ...], rows: int, vectors: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a matrix [vectors, rows] with a row for each vector of column multipliers and a column for each row of the
    weight. Element (k, i) is 1 if vector k scales row i, else 0."""
    key = (spans, rows, vectors, device, dtype)
    if key not in _MEMBERS:
        index = _rows_to_cols(spans, rows, device)
        _MEMBERS[key] = (index == torch.arange(vectors, device=device)[:, None]).to(dtype)
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
    """Turn `grad` from G = dL/dW_eff into dL/dW in place, and return (sum_j W kappa G, rho W G).

    The first is dL/drho. The caller sums the second over rows, which gives dL/dkappa; it is None if there is no kappa.
    """
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
    # The function takes one tensor and changes it in place. If it took two views of one buffer, the compiled function
    # would keep using the offset that it saw in its first call.
    weight.copy_(_scaled(weight, rho, kappa, index))


def _backward_piece(
    grad: Tensor, weight: Tensor, rho: Tensor | None, kappa: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    # This is a separate function, because torch limits the compilations of each function, and layers need many.
    return _backward(grad, weight, rho, kappa, index)


_scale_compiled = torch.compile(_scaled, dynamic=False)
_backward_compiled = torch.compile(_backward, dynamic=False)
_scale_piece_compiled = torch.compile(_scale_piece, dynamic=True)
_backward_piece_compiled = torch.compile(_backward_piece, dynamic=True)
