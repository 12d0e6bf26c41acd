"""Scaling of a layer's local weight by the layer's multipliers, and the gradients through this scaling.

The module does no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megamult.multipliers import kernels
from megamult.multipliers.scaling import band_of
from megamult.multipliers.specs import LEAVES, multiplier
from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import Rectangle, rectangles
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Segment, Side


class LayerScaling:
    """Scaling of a layer's weight by the layer's row, column and scalar multipliers.

    The whole shard of the weight is one :class:`~megamult.multipliers.scaling.Band`.

    Args:
        weight: spec of the weight, which must have two dimensions.
        placement: the sides on which each role is scaled.
        coordinates: coordinates of the process.
        shared_columns: whether the logical matrices that have column multipliers share one vector of them. The layer
            still stores a copy of this vector for each matrix. Only the first copy is used, for all matrices, and every
            copy gets the sum of the matrices' gradients, so that the copies stay equal.
    """

    def __init__(
        self, weight: ParameterSpec, placement: Placement, coordinates: Coordinates, shared_columns: bool = False
    ) -> None:
        self._shared_columns = shared_columns
        places: dict[tuple[int, Side], list[Segment]] = {}
        for side in LEAVES:
            if parts := weight.parts_with(placement, side):
                for segment in multiplier(side, weight, parts, partial=False).local_segments(coordinates):
                    places.setdefault((parts[segment.part], side), []).append(segment)
                if side == "col" and shared_columns:
                    places |= {(part, side): places[parts[0], side] for part in parts}
        height, self._width = weight.local_shape(coordinates.grid)
        held = rectangles(weight, coordinates, 0, height * self._width)
        band = band_of(list(_with_padding(held, height, self._width)), places, one=-1)
        # The column multipliers need no index: viewed as [vectors, in] they are kappa. A band numbers its vectors of
        # column multipliers in its own order, so each span gets the number of its vector in kappa instead.
        vectors = [int(entries[0]) // self._width for entries in band.col]
        self._spans = tuple(s if s.col is None else s._replace(col=vectors[s.col]) for s in band.spans)
        rows = torch.arange(height)
        self._rows_are_whole = bool((band.row == rows).all())
        self._index = {
            "row": band.row,  # index of the row multiplier of each row; -1 if it has none
            "scaled": rows[band.row >= 0],  # index of the row that each row multiplier scales
            "scalar": band.scalar,  # index of the scalar of each row; -1 if it has none
        }
        self._rows_of_scalar = [rows[band.scalar == i] for i in range(len(weight.parts_with(placement, "scalar")))]

    def _at(self, key: str, device: torch.device) -> Tensor:
        """Return the tensor of indices `_index[key]` on `device`, and keep it there for later calls."""
        if self._index[key].device != device:
            self._index[key] = self._index[key].to(device)
        return self._index[key]

    def _rho(self, row: Tensor | None, scalar: Tensor | None) -> Tensor | None:
        """Return rho [out], the product of row multiplier and scalar of each row. A missing factor counts as 1. Return
        None if no row has either."""
        rho = row if row is None or self._rows_are_whole else _with_one(row)[self._at("row", row.device)]
        if scalar is None:
            return rho
        scales = _with_one(scalar)[self._at("scalar", scalar.device)]
        return scales if rho is None else rho * scales

    def _kappa(self, col: Tensor | None) -> Tensor | None:
        return None if col is None else col.view(-1, self._width)

    def scale(self, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None) -> Tensor:
        """Return W_eff = s diag(r) W diag(c), [out, in], in the weight's dtype.

        Args:
            weight: the local weight, [out, in].
            row: the layer's `row_multiplier`, [row multipliers]. It has the same length on all processes, so its last
                elements are unused on a process with fewer row multipliers.
            col: the layer's `col_multiplier`, one vector after the other, [matrices * in].
            scalar: the layer's `scalar_multiplier`, [matrices].
        """
        return kernels.scale(weight, self._rho(row, scalar), self._kappa(col), self._spans)

    def gradients(
        self, grad: Tensor, weight: Tensor, row: Tensor | None, col: Tensor | None, scalar: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return dL/dW, dL/dr, dL/dc, dL/ds by equation 4 of arXiv 2601.04890, in the parameters' shapes and dtypes.

        Args:
            grad: G = dL/dW_eff, [out, in]; overwritten, and returned as dL/dW.
            weight, row, col, scalar: the same as for :meth:`scale`. If a multiplier is None, so is its gradient.
        """
        dot, cols = kernels.scale_backward(
            grad,
            weight,
            self._rho(row, scalar),
            self._kappa(col),
            self._spans,
            row=row is not None or scalar is not None,
            col=col is not None,
        )
        grad_row = grad_scalar = None
        if row is not None and dot is not None:
            scales = self._rho(None, None if scalar is None else scalar.float())
            by_row = dot if scales is None else dot * scales  # dr = s sum_j W c G
            if self._rows_are_whole:
                grad_row = by_row.to(row.dtype)
            else:
                scaled = self._at("scaled", row.device)
                grad_row = torch.zeros_like(row)
                grad_row[: len(scaled)] = by_row[scaled].to(row.dtype)
        if scalar is not None and dot is not None:
            rho = self._rho(row, None)
            by_row = dot if rho is None else dot * rho.float()  # ds = sum_i r sum_j W c G
            self._rows_of_scalar = [rows.to(dot.device) for rows in self._rows_of_scalar]
            grad_scalar = torch.stack([by_row[rows].sum() for rows in self._rows_of_scalar]).to(scalar.dtype)
        if cols is not None and self._shared_columns:
            cols = cols.sum(0, keepdim=True).expand_as(cols)
        return grad, grad_row, None if cols is None or col is None else cols.reshape(-1).to(col.dtype), grad_scalar


def _with_one(values: Tensor) -> Tensor:
    """Return the values [n] followed by a 1, which index -1 selects."""
    return torch.cat([values, values.new_ones(1)])


def _with_padding(held: Iterable[Rectangle], height: int, width: int) -> Iterator[Rectangle]:
    """Yield rectangles that cover all rows of a shard: the rectangles `held`, which are whole rows, and the padding
    before, between and after them. The `part` of padding is -1."""
    position, col = 0, 0
    for r in held:
        if position < r.offset // width:
            yield Rectangle(-1, 0, r.col, r.offset // width - position, width, position * width)
        yield r
        position, col = r.offset // width + r.height, r.col
    if position < height:
        yield Rectangle(-1, 0, col, height - position, width, position * width)
