"""Matrices of fixed norm: after every update, each is scaled back to the Frobenius norm that it began with.

Only the direction of such a matrix W is trained. The scale of the effective weight W_eff = diag(r) W diag(c) is set by
the multipliers r and c, which are the gains of arXiv 2606.25971. Without multipliers this scale is fixed too. W has no
weight decay, because scaling W back would undo its effect on the norm.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice

NORM = "fixed_norm"
"""Name in checkpoints: `optimizer.fixed_norm.<name of the logical matrix>` holds one value, the norm of the matrix."""


class _Piece(NamedTuple):
    """Elements [start, stop) of a flattened tensor, which belong to one matrix."""

    matrix: int
    start: int
    stop: int
    counted: bool
    """Whether a sum over processes includes this process's copy of the elements."""


class FixedNorms:
    """Frobenius norms of logical matrices, and the scaling that keeps them.

    Args:
        partition: the partition whose tensors the optimizer updates.
        selects: function that takes a parameter's spec and returns whether its matrices have fixed norms.
        weight: function that takes a slice and returns a [length] view of its weights without multipliers.

    Attributes:
        names: names of the logical matrices, in the same order on every rank.
        norms: [matrices] the norms to keep, in fp32, the same on every rank. If initial weights are not drawn,
            because a checkpoint will replace them, weights and norms are NaN until the checkpoint is loaded.
    """

    def __init__(
        self, partition: Partition, selects: Callable[[ParameterSpec], bool], weight: Callable[[Slice], Tensor]
    ) -> None:
        self._partition, self._weight = partition, weight
        first: dict[str, int] = {}  # index of the first matrix of each parameter
        self.names: list[str] = []
        for cut in partition.cuts:
            if selects(cut.spec):
                first[cut.name] = len(self.names)
                self.names += [cut.spec.logical_name(cut.name, part) for part in cut.spec.parts]
        self._pieces: dict[Tensor, list[_Piece]] = defaultdict(list)
        self._pieces_of_slice: list[tuple[Slice, list[_Piece]]] = []
        for piece in partition.slices:
            if piece.name not in first:
                continue
            counted = bool(partition.counted(piece))
            found = [
                _Piece(first[piece.name] + r.part, r.offset, r.offset + r.numel, counted and r.counted)
                for r in rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length)
            ]
            self._pieces_of_slice.append((piece, found))
            self._pieces[piece.tensor] += [
                each._replace(start=piece.offset + each.start, stop=piece.offset + each.stop) for each in found
            ]
        self._here = device.local_device()
        self.norms = self._measured()
        self._check()

    def _check(self) -> None:
        """Check that no norm is 0.

        Raises:
            ValueError: a norm is 0. A matrix of norm 0 has no direction, and would stay 0.
        """
        zero = [name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if norm == 0]
        if zero:
            raise ValueError(
                f"{len(zero)} matrices are 0, the first is {zero[0]}, and multipliers.norm is fixed: they would stay "
                "0; initialize them with other values, or set multipliers.norm to free"
            )

    @torch.no_grad()
    def project(self, tensors: Sequence[Tensor]) -> None:
        """Scale the matrices in some tensors back to their fixed norms. All ranks must call this together.

        Args:
            tensors: tensors that have been updated and hold W. All ranks give tensors of the same param group. The
                tensors of all ranks together hold whole matrices.
        """
        pieces = [(tensor.detach().view(-1)[p.start : p.stop], p) for tensor in tensors for p in self._pieces[tensor]]
        squares = self._squares(pieces)
        factors = torch.where(squares > 0, self.norms / squares.sqrt().float(), 1.0)
        for values, piece in pieces:
            values.mul_(factors[piece.matrix])

    def views(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each matrix and a view [1] of its norm, which may be written to."""
        for i, name in enumerate(self.names):
            yield name, self.norms[i : i + 1]

    @torch.no_grad()
    def restored(self) -> None:
        """Measure the norms that no checkpoint gave, which are NaN until then.

        All ranks must call this together, after weights have been loaded.
        """
        self.norms = torch.where(self.norms.isnan(), self._measured(), self.norms)
        self._check()

    def _measured(self) -> Tensor:
        """Return the present norms of all matrices, [matrices] in fp32."""
        pieces = [(self._weight(piece)[p.start : p.stop], p) for piece, found in self._pieces_of_slice for p in found]
        return self._squares(pieces).sqrt().float()

    def _squares(self, pieces: Sequence[tuple[Tensor, _Piece]]) -> Tensor:
        """Return the sums of squares of the matrices over all processes, [matrices] in fp64."""
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=self._here)
        # Sorted and summed segment by segment, not with index_add_, which on a GPU adds in no fixed order.
        counted = sorted(((p.matrix, values) for values, p in pieces if p.counted), key=lambda each: each[0])
        if counted:
            norms = torch.stack(torch._foreach_norm([values for _, values in counted], dtype=torch.float32))
            number_of_pieces = Counter(matrix for matrix, _ in counted)
            lengths = torch.tensor(list(number_of_pieces.values()), device=norms.device)
            sums = torch.segment_reduce(norms.double().square(), "sum", lengths=lengths)
            squares[torch.tensor(list(number_of_pieces), device=self._here)] = sums.to(self._here)
        return self._partition.mesh.sum_over(squares)
