"""RMS of all matrices, of their effective matrices and of the last update, and spread of row and column norms.

The spread is the coefficient of variation of the norms in a matrix or an effective matrix. Each rank computes sums of
squares from its own slices. Added over all ranks, these sums give the figures of whole matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.monitor.names import by_place, layer_of, mean
from megamult.monitor.squares import pooled_rms, squares_of, totals, variation
from megamult.multipliers.specs import LEAVES
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.rectangles import Rectangle, rectangles
from megamult.parameters.spec import Role, Side
from megamult.zero.partition import Partition

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Largest number of elements that are processed at a time, by type of device. It bounds temporary memory (256 MiB on a
GPU), and lets a block fit into the cache of a CPU."""


@dataclass(frozen=True)
class Matrix:
    """One logical matrix, and the place of its sums of squares in the packed vector of all sums."""

    name: str
    role: Role
    layer: int | None
    """Index of the matrix's layer, or None if it is in no layer."""
    rows: int
    cols: int
    start: int
    """Position of the first of its sums. One sum for each row comes first, then one for each column. If the matrix has
    multipliers, the same sums of the effective matrix follow."""
    multipliers: Mapping[Side, str]
    """Logical names of the matrix's multipliers, by side."""

    @property
    def lengths(self) -> list[int]:
        """Lengths of the packed vectors of sums: the number of rows and the number of columns, and, if the matrix has
        multipliers, both again for the effective matrix."""
        return [self.rows, self.cols] * (2 if self.multipliers else 1)

    def log_factor(self, side: Side, vectors: Mapping[str, Tensor]) -> Tensor | None:
        """Return ln|multiplier| of each row or column, in float64, with the scalar included, or None if the matrix has
        neither a scalar nor multipliers on this side.

        Args:
            side: row or col.
            vectors: values of all multipliers by name.
        """
        logs = [vectors[self.multipliers[each]].double().abs().log() for each in (side, "scalar") if self._has(each)]
        size = self.rows if side == "row" else self.cols
        return sum(logs[1:], logs[0]).expand(size) if logs else None

    def _has(self, side: str) -> bool:
        return side in self.multipliers


class Weights:
    """Sums of squares of all matrices of a model. Every rank calls every method together.

    Each rank adds the squares of the elements that it holds to one packed vector, which has the sums over each row and
    each column of each logical matrix. One all-reduce sums this vector over all ranks.

    Args:
        partition, optimizer: the partition of this rank, and the optimizer that updates the weights in it.
        vectors: names of the model's logical vectors, among which each matrix's multipliers are found.

    Attributes:
        matrices: all logical matrices, in the same order on every rank.
    """

    def __init__(self, partition: Partition, optimizer: TwoPhaseOptimizer, vectors: Mapping[str, object]) -> None:
        self._partition, self._optimizer = partition, optimizer
        self.matrices: list[Matrix] = []
        index: dict[str, list[int]] = {}
        position = 0
        for cut in partition.cuts:
            if len(cut.spec.shape) == 1:
                continue
            index[cut.name] = []
            module = cut.name.rpartition(".")[0]
            for part in cut.spec.parts:
                sides = {
                    side: name
                    for side, leaf in LEAVES.items()
                    if (name := cut.spec.logical_name(f"{module}.{leaf}" if module else leaf, part)) in vectors
                }
                name = cut.spec.logical_name(cut.name, part)
                matrix = Matrix(name, part.role, layer_of(name), part.rows, cut.spec.cols, position, sides)
                index[cut.name].append(len(self.matrices))
                self.matrices.append(matrix)
                position += sum(matrix.lengths)
        self._size = position
        self._here = device.local_device()
        self._blocks: list[tuple[int, list[tuple[int, Rectangle]]]] = []
        """(index of the slice, its blocks) for each slice that this rank adds to the sums. A block is (index of its
        matrix, rectangle)."""
        for i, piece in enumerate(partition.slices):
            if piece.name in index and partition.counted(piece):
                held = rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length)
                blocks = [(index[piece.name][r.part], block) for r in held if r.counted for block in _bounded(r)]
                self._blocks.append((i, blocks))
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the weights that this rank measures, so that the next :meth:`figures` includes the RMS of their change.

        If :meth:`figures` has not been called since the last copy, that copy stays.
        """
        if self._before is None:
            self._before = [self._optimizer.weight(self._partition.slices[i]).clone() for i, _ in self._blocks]

    @torch.no_grad()
    def figures(self, vectors: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the RMS of W and of W_eff, and the coefficients of variation of their row and column norms.

        They are by role and layer. After :meth:`remember`, the RMS of the change of W is among them. Collective over
        all ranks: one all-reduce.

        Args:
            vectors: values of all multipliers by name, complete on every rank.
        """
        sums = torch.zeros(self._size + len(self.matrices), device=self._here)
        scales = [self._scales(matrix, vectors) for matrix in self.matrices]
        for k, (i, blocks) in enumerate(self._blocks):
            weight = self._optimizer.weight(self._partition.slices[i])
            for m, r in blocks:
                self._add(sums, m, r, weight, scales[m])
                if self._before is not None:
                    change = _of(r, weight).float() - _of(r, self._before[k]).float()
                    sums[self._size + m] += change.square_().sum()
        with_updates, self._before = self._before is not None, None
        self._partition.mesh.sum_over(sums)
        found = self._spread(sums[: self._size])
        if with_updates:
            changes = sums[self._size :].tolist()
            found |= self._rms("update_rms", dict(enumerate(changes)))
        return found

    def _add(
        self, sums: Tensor, m: int, r: Rectangle, weight: Tensor, scales: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Add the squares of one block to the sums of its matrix."""
        rho, kappa = scales
        matrix = self.matrices[m]
        squares = squares_of(
            _of(r, weight),
            None if rho is None else rho[r.row : r.row + r.height],
            None if kappa is None else kappa[r.col : r.col + r.width],
        )
        starts = itertools.accumulate(matrix.lengths, initial=matrix.start)
        for start, at, added in zip(starts, (r.row, r.col, r.row, r.col), squares, strict=False):
            if added is not None:
                sums[start + at : start + at + len(added)] += added

    def _scales(self, matrix: Matrix, vectors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the factors of the rows and of the columns of a matrix, each None if there are none. The scalar counts
        as a factor of the rows."""
        held = {side: vectors[name] for side, name in matrix.multipliers.items()}
        rho = held.get("row")
        if (scalar := held.get("scalar")) is not None:
            rho = scalar.expand(matrix.rows) if rho is None else rho * scalar
        return rho, held.get("col")

    def _spread(self, sums: Tensor) -> dict[str, float]:
        """Return the RMS of W and of W_eff, and the coefficients of variation of their row and column norms.

        Args:
            sums: sums of squares over all ranks, in packed order.
        """
        if not self.matrices:
            return {}
        table = iter(totals(sums, [length for matrix in self.matrices for length in matrix.lengths]))
        squares: dict[str, dict[int, float]] = {"weight": {}, "effective": {}}
        spreads: dict[str, list[tuple[str | None, int | None, float]]] = {}
        for m, matrix in enumerate(self.matrices):
            for what in ("weight", "effective") if matrix.multipliers else ("weight",):
                for side, count in (("row", matrix.rows), ("col", matrix.cols)):
                    total, roots = next(table)
                    squares[what][m] = total  # set twice: columns give the same sum as rows, in another order
                    each = (matrix.role, matrix.layer, variation(total, roots, count))
                    spreads.setdefault(f"{what}_{side}_cv", []).append(each)
        found: dict[str, float] = {}
        for what, of_matrix in squares.items():
            found |= self._rms(f"{what}_rms", of_matrix)
        for metric, members in spreads.items():
            found |= by_place(metric, members, mean)
        return found

    def _rms(self, metric: str, squares: Mapping[int, float]) -> dict[str, float]:
        """Return the RMS by role and layer, from {index of a matrix: its sum of squares}."""
        values = []
        for m, total in squares.items():
            matrix = self.matrices[m]
            values.append((matrix.role, matrix.layer, (total, matrix.rows * matrix.cols)))
        return by_place(metric, values, pooled_rms)


def _of(r: Rectangle, values: Tensor) -> Tensor:
    """Return the elements of a rectangle as a view [height, width] of a slice's values."""
    return values[r.offset : r.offset + r.numel].view(r.height, r.width)


def _bounded(r: Rectangle) -> Iterator[Rectangle]:
    """Split a rectangle by rows into blocks of at most `_ELEMENTS` elements, or of one row if a row is longer.

    Blocks are processed one at a time, which bounds temporary memory.
    """
    step = max(1, _ELEMENTS[device.local_device().type] // r.width)
    for row in range(0, r.height, step):
        height = min(step, r.height - row)
        yield replace(r, row=r.row + row, height=height, offset=r.offset + row * r.width)
