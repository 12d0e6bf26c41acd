"""Where the multipliers of one layer's local weight sit, and the chain rule through them. No communication."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.layout import Layout, Run
from megamult.multipliers import kernels
from megamult.multipliers.placement import Placement


def _spans(runs: tuple[Run, ...], col_of: dict[int, int], rows: int) -> tuple[kernels.Span, ...]:
    """The runs as spans; rows of padding, which are part of no run, as spans without column multipliers."""
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
    """Where the multipliers of one layer's local weight sit: local rows, column vectors, scalars."""

    def __init__(self, weight: Layout, placement: Placement, tp_rank: int, tp_size: int) -> None:
        self.row_parts = weight.parts_with(placement, "row")
        self.col_parts = weight.parts_with(placement, "col")
        self.scalar_parts = weight.parts_with(placement, "scalar")
        self.local_cols = weight.local_shape(tp_size)[1]
        self.local_rows = weight.local_shape(tp_size)[0]
        runs = weight.local_runs(tp_rank, tp_size)
        col_of = {part: i for i, part in enumerate(self.col_parts)}
        self.spans = _spans(runs, col_of, self.local_rows)
        self.row_runs: list[tuple[int, int, int]] = []  # (local row, row multiplier, length)
        position = 0
        for run in runs:
            if run.part in self.row_parts:
                self.row_runs.append((run.start, position, run.length))
                position += run.length
        scalar_of = {part: i for i, part in enumerate(self.scalar_parts)}
        self.scalar_runs = [(r.start, scalar_of[r.part], r.length) for r in runs if r.part in scalar_of]
        self.rows_are_whole = self.row_runs == [(s.start, s.start, s.stop - s.start) for s in self.spans] and (
            position == self.local_rows
        )

    def _rho(self, row: Tensor | None, scalar: Tensor | None) -> Tensor | None:
        """rho[out]: row multipliers times scalars, 1 for rows that have neither."""
        if scalar is None and (row is None or self.rows_are_whole):
            return row
        example = row if row is not None else scalar
        assert example is not None
        rho = torch.ones(self.local_rows, dtype=example.dtype, device=example.device)
        if row is not None:
            for start, position, length in self.row_runs:
                rho[start : start + length] = row[position : position + length]
        if scalar is not None:
            for start, index, length in self.scalar_runs:
                rho[start : start + length] *= scalar[index]
        return rho

    def scale(self, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None) -> Tensor:
        kappa = None if col is None else col.view(-1, self.local_cols)
        return kernels.scale(weight, self._rho(row, scalar), kappa, self.spans)

    def gradients(
        self, grad: Tensor, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """dL/dW, dL/dr, dL/dc, dL/ds by equation 4 of arXiv 2601.04890, in the parameters' dtypes."""
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
            if self.rows_are_whole:
                grad_row = dot.to(row.dtype)
            else:
                grad_row = torch.zeros_like(row)
                for start, position, length in self.row_runs:
                    grad_row[position : position + length] = dot[start : start + length]
        if scalar is not None:
            assert back.row_dot is not None
            rho = self._rho(row, None)
            dot = back.row_dot if rho is None else back.row_dot * rho.float()  # ds = sum_i r sum_j W c G
            grad_scalar = torch.zeros_like(scalar, dtype=torch.float32)
            for start, index, length in self.scalar_runs:
                grad_scalar[index] += dot[start : start + length].sum()
            grad_scalar = grad_scalar.to(scalar.dtype)
        grad_col = None if back.col is None or col is None else back.col.view(-1).to(col.dtype)
        return back.weight, grad_row, grad_col, grad_scalar
