"""Positions of the multipliers of one layer's local weight, and the chain rule through them. No communication."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.multipliers import kernels
from megamult.parameters.axes import Coordinates
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Segment


class _OnDevice:
    """An index that is made on the CPU and copied once to the device where it is used."""

    def __init__(self, index: Tensor) -> None:
        self._index = index

    def at(self, device: torch.device) -> Tensor:
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index


def _with_one(values: Tensor) -> Tensor:
    """Return values[n] followed by a 1, which index -1 selects."""
    return torch.cat([values, values.new_ones(1)])


def _spans(runs: tuple[Segment, ...], col_of: dict[int, int], rows: int) -> tuple[kernels.Span, ...]:
    """Return segments as spans; rows of padding, which are in no segment, become spans without column multipliers."""
    spans: list[kernels.Span] = []
    position = 0
    for run in runs:
        if position < run.start:
            spans.append(kernels.Span(position, run.start, None))
        position = run.start + run.length
        spans.append(kernels.Span(run.start, position, col_of.get(run.part)))
    if position < rows:
        spans.append(kernels.Span(position, rows, None))
    return tuple(spans)


class ScalePlan:
    """Positions of the multipliers of one layer's local weight: local rows, column vectors, scalars."""

    def __init__(self, weight: ParameterSpec, placement: Placement, coordinates: Coordinates) -> None:
        self.row_parts = weight.parts_with(placement, "row")
        self.col_parts = weight.parts_with(placement, "col")
        self.scalar_parts = weight.parts_with(placement, "scalar")
        self.local_rows, self.local_cols = weight.local_shape(coordinates.grid)
        runs = weight.local_segments(coordinates)
        col_of = {part: i for i, part in enumerate(self.col_parts)}
        self.spans = _spans(runs, col_of, self.local_rows)
        rows = torch.arange(self.local_rows)
        row_of, scalar_of = torch.full_like(rows, -1), torch.full_like(rows, -1)
        position = 0
        for run in runs:
            if run.part in self.row_parts:
                row_of[run.start : run.start + run.length] = torch.arange(position, position + run.length)
                position += run.length
            if run.part in self.scalar_parts:
                scalar_of[run.start : run.start + run.length] = self.scalar_parts.index(run.part)
        self._row_of = _OnDevice(row_of)
        """Index [out] of the row multiplier that scales a local row; -1: none."""
        self._scaled_rows = _OnDevice(rows[row_of >= 0])
        """Local row that each row multiplier scales: [row multipliers]."""
        self._scalar_of = _OnDevice(scalar_of)
        """Index [out] of the scalar that scales a local row; -1: none."""
        self._rows_of_scalar = [_OnDevice(rows[scalar_of == i]) for i in range(len(self.scalar_parts))]
        self._rows_are_whole = bool((row_of == rows).all())

    def _rho(self, row: Tensor | None, scalar: Tensor | None) -> Tensor | None:
        """Return rho[out]: row multipliers times scalars, 1 for rows that have neither; None: no row has any."""
        rho = row if row is None or self._rows_are_whole else _with_one(row)[self._row_of.at(row.device)]
        if scalar is None:
            return rho
        scales = _with_one(scalar)[self._scalar_of.at(scalar.device)]
        return scales if rho is None else rho * scales

    def scale(self, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None) -> Tensor:
        """Return W_eff = s diag(r) W diag(c), [out, in], in the weight's dtype.

        Args:
            weight: the local weight, [out, in].
            row: one multiplier for each local row of `row_parts`, in local order, [row multipliers]; a padded
                parameter may have unused entries after them.
            col: one vector for each of `col_parts`, one after the other, [matrices * in].
            scalar: one for each of `scalar_parts`, [matrices].
        """
        kappa = None if col is None else col.view(-1, self.local_cols)
        return kernels.scale(weight, self._rho(row, scalar), kappa, self.spans)

    def gradients(
        self, grad: Tensor, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return dL/dW, dL/dr, dL/dc, dL/ds by equation 4 of arXiv 2601.04890, in the parameters' shapes and dtypes.

        Args:
            grad: G = dL/dW_eff, [out, in]; overwritten.
            weight, row, col, scalar: the same as for :meth:`scale`; the gradient of one that is None is None.
        """
        kappa = None if col is None else col.view(-1, self.local_cols)
        needs_row_dot = row is not None or scalar is not None
        back = kernels.scale_backward(
            grad, weight, self._rho(row, scalar), kappa, self.spans, needs_row_dot=needs_row_dot
        )
        grad_row = grad_scalar = None
        if row is not None:
            assert back.row_dot is not None
            dot = back.row_dot
            scales = self._rho(None, None if scalar is None else scalar.float())
            if scales is not None:
                dot = dot * scales  # dr = s sum_j W c G
            if self._rows_are_whole:
                grad_row = dot.to(row.dtype)
            else:
                scaled = self._scaled_rows.at(dot.device)
                grad_row = torch.zeros_like(row)
                grad_row[: len(scaled)] = dot[scaled].to(row.dtype)
        if scalar is not None:
            assert back.row_dot is not None
            rho = self._rho(row, None)
            dot = back.row_dot if rho is None else back.row_dot * rho.float()  # ds = sum_i r sum_j W c G
            sums = [dot[rows.at(dot.device)].sum() for rows in self._rows_of_scalar]
            grad_scalar = torch.stack(sums).to(scalar.dtype)
        grad_col = None if back.col is None or col is None else back.col.view(-1).to(col.dtype)
        return back.weight, grad_row, grad_col, grad_scalar
