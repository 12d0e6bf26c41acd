"""Exchange of pieces of logical matrices: ranks send them to the owners, which compute and send the results back.

The plan (:mod:`megamult.optim.muon.plan`) says which pieces each rank sends to which owner. This file packs, sends and
unpacks them. Each bucket takes two all-to-alls over all ranks. While the owners compute bucket k, the pieces of bucket
k + 1 and the results of bucket k - 1 are on their way.

A matrix that its owner holds whole, with its elements in their order, is computed where it is, without a copy. One that
arrives in pieces, or whose rows lie between those of others (Q, K and V), is put together first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import Work

from megamult.distributed.mesh import Mesh
from megamult.optim.muon.plan import Plan
from megamult.parameters.rectangles import Rectangle


@dataclass
class _Direction:
    """Pieces that this rank exchanges in one direction, to owners or back to holders, in the order of the buffers.

    A rank owns a piece if it owns the piece's matrix.
    """

    held: list[tuple[int, int, int]] = field(default_factory=list)
    """Pieces that this rank holds and another rank owns: (index of the slice, offset in the slice, elements)."""
    held_sizes: list[int] = field(default_factory=list)
    """[ranks] number of elements in `held` that each rank owns."""
    owned: list[tuple[int, int, Rectangle]] = field(default_factory=list)
    """Pieces that this rank owns and another rank holds: (index of the batch, index in the batch, rectangle)."""
    owned_sizes: list[int] = field(default_factory=list)
    """[ranks] number of elements in `owned` that each rank holds."""
    local: list[tuple[int, int, int, Rectangle]] = field(default_factory=list)
    """Pieces that this rank both holds and owns: (index of the slice, index of the batch, index in the batch,
    rectangle)."""

    def without(self, whole: Set[tuple[int, int]]) -> _Direction:
        """Return the same pieces without those of some matrices, named by (index of the batch, index in the batch)."""
        return replace(self, local=[piece for piece in self.local if (piece[1], piece[2]) not in whole])


@dataclass
class _Bucket:
    """This rank's work for one bucket: matrices that it owns, in batches of one shape, and pieces that it exchanges."""

    shapes: list[tuple[int, int, int]]
    """Shape (matrices, rows, cols) of each batch of matrices that this rank owns."""
    members: list[list[int]]
    """Indices, in `Plan.matrices`, of the matrices in each batch."""
    whole: dict[tuple[int, int], tuple[int, Rectangle]]
    """(index of the slice, rectangle) of each matrix that lies whole in a slice of this rank, by (index of the batch,
    index in the batch)."""
    to_owners: _Direction
    """Pieces of the matrices that are not in `whole`."""
    to_holders: _Direction


class Exchange:
    """One rank's part in the exchange.

    Args:
        plan: the plan, the same on every rank.
        mesh: the mesh of the processes, with the same grid as the plan.
        slice_of_cut: mapping from the index of a parameter in `Plan.cuts` to the index of this rank's slice of the
            parameter in the `values` of :meth:`run`. A parameter of which this rank has no slice has no key.
        dtype: dtype in which pieces travel, both ways.
        device: the device of the slices.
    """

    def __init__(
        self, plan: Plan, mesh: Mesh, slice_of_cut: dict[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan, self.dtype, self.device = plan, dtype, device
        self.bytes_sent = 0
        """Number of bytes that this rank has sent to others since construction."""
        self._ranks, self._world = plan.ranks, mesh.world
        self._buckets = [self._bucket(bucket, mesh.rank, slice_of_cut) for bucket in plan.buckets]

    def _bucket(self, matrices: Sequence[int], rank: int, slice_of_cut: dict[int, int]) -> _Bucket:
        plan = self.plan
        by_owner: dict[int, list[int]] = {}
        for i in matrices:
            by_owner.setdefault(plan.owners[i], []).append(i)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i in by_owner.get(rank, []):
            by_shape.setdefault((plan.matrices[i].rows, plan.matrices[i].cols), []).append(i)
        place = {i: (b, k) for b, members in enumerate(by_shape.values()) for k, i in enumerate(members)}

        def direction(elements: NDArray[np.int64], counted: bool) -> _Direction:
            """Return this rank's pieces for one of the two all-to-alls.

            Args:
                elements: [matrices, ranks] number of elements that are sent between each rank and the matrix's owner.
                counted: which copies to return if several ranks hold copies of a piece. True, for the way to the
                    owners, returns only the copy that counts in sums (:attr:`Rectangle.counted`). False, for the way
                    back to the holders, returns all copies.
            """
            found = _Direction()
            for other in range(self._ranks):
                mine = [
                    (i, cut, rectangle)
                    for i in by_owner.get(other, [])
                    if elements[i, rank]
                    for cut, rectangle in plan.fragments(i, rank, counted)
                ]
                if other == rank:
                    found.local = [(slice_of_cut[cut], *place[i], rectangle) for i, cut, rectangle in mine]
                    held, owned = [], []
                else:
                    held = [(slice_of_cut[cut], rectangle.offset, rectangle.numel) for _, cut, rectangle in mine]
                    owned = [
                        (*place[i], rectangle)
                        for i in by_owner.get(rank, [])
                        if elements[i, other]
                        for _, rectangle in plan.fragments(i, other, counted)
                    ]
                found.held += held
                found.held_sizes.append(sum(numel for _, _, numel in held))
                found.owned += owned
                found.owned_sizes.append(sum(rectangle.numel for _, _, rectangle in owned))
            return found

        shapes = [(len(members), *shape) for shape, members in by_shape.items()]
        to_owners = direction(plan.given, True)
        replicated = not np.array_equal(plan.given, plan.held)
        to_holders = direction(plan.held, False) if replicated else to_owners
        whole = {
            (batch, i): (s, rectangle)
            for s, batch, i, rectangle in to_owners.local
            if (rectangle.height, rectangle.width) == shapes[batch][1:]
        }
        return _Bucket(shapes, list(by_shape.values()), whole, to_owners.without(whole.keys()), to_holders)

    def run(self, values: Sequence[Tensor], compute: Callable[[list[Tensor], Sequence[int]], Tensor]) -> None:
        """Compute a result for each whole matrix, and overwrite each value with the result's element at the same place.

        All ranks must call this together.

        Args:
            values: [length] values of each of this rank's slices, in any floating dtype; overwritten.
            compute: function (matrices, indices) -> results. `matrices` are whole matrices, [rows, cols] each, in the
                exchange's dtype or in that of the values, which it must not change. `indices` are their indices in
                `Plan.matrices`. The results are one tensor, [batch, rows, cols].
        """
        arriving = self._gather(0, values) if self._buckets else None
        returning: tuple[int, Tensor, Work | None, Tensor] | None = None
        for k, bucket in enumerate(self._buckets):
            assert arriving is not None
            received, work, sent = arriving
            arriving = self._gather(k + 1, values) if k + 1 < len(self._buckets) else None
            if work is not None:
                work.wait()
            del sent  # only now, because the collective reads it until it is done
            batches = self._assemble(bucket, received, values)
            del received
            results = []
            for members in bucket.members:  # pop, so that a batch is freed once it is computed
                results.append(compute(batches.pop(0), members).to(self.dtype))
            following = self._scatter(k, results, values)
            if returning is not None:
                self._finish(*returning, values)
            returning = following
        if returning is not None:
            self._finish(*returning, values)

    def _gather(self, k: int, values: Sequence[Tensor]) -> tuple[Tensor, Work | None, Tensor]:
        direction = self._buckets[k].to_owners
        send = torch.empty(sum(direction.held_sizes), dtype=self.dtype, device=self.device)
        pieces = send.split([numel for _, _, numel in direction.held])
        sources = [values[s][offset : offset + numel] for s, offset, numel in direction.held]
        if sources:
            torch._foreach_copy_(list(pieces), sources)
        receive = torch.empty(sum(direction.owned_sizes), dtype=self.dtype, device=self.device)
        return receive, self._all_to_all(receive, send, direction.owned_sizes, direction.held_sizes), send

    def _assemble(self, bucket: _Bucket, received: Tensor, values: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the matrices of each batch, as views of slices where they lie whole in them."""
        direction = bucket.to_owners
        batches = [
            [
                _flat(values[bucket.whole[batch, i][0]], bucket.whole[batch, i][1])
                if (batch, i) in bucket.whole
                else torch.empty(rows, cols, dtype=self.dtype, device=self.device)
                for i in range(count)
            ]
            for batch, (count, rows, cols) in enumerate(bucket.shapes)
        ]
        targets, sources = [], []
        pieces = received.split([rectangle.numel for _, _, rectangle in direction.owned])
        for (batch, i, rectangle), piece in zip(direction.owned, pieces, strict=True):
            targets.append(_view(batches[batch][i], rectangle))
            sources.append(piece.view(rectangle.height, rectangle.width))
        for s, batch, i, rectangle in direction.local:
            targets.append(_view(batches[batch][i], rectangle))
            sources.append(_flat(values[s], rectangle))
        if targets:
            torch._foreach_copy_(targets, sources)
        return batches

    def _scatter(
        self, k: int, results: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[int, Tensor, Work | None, Tensor]:
        direction = self._buckets[k].to_holders
        send = torch.empty(sum(direction.owned_sizes), dtype=self.dtype, device=self.device)
        targets, sources = [], []
        pieces = send.split([rectangle.numel for _, _, rectangle in direction.owned])
        for (batch, i, rectangle), piece in zip(direction.owned, pieces, strict=True):
            targets.append(piece.view(rectangle.height, rectangle.width))
            sources.append(_view(results[batch][i], rectangle))
        for s, batch, i, rectangle in direction.local:
            targets.append(_flat(values[s], rectangle))
            sources.append(_view(results[batch][i], rectangle))
        if targets:
            torch._foreach_copy_(targets, sources)
        receive = torch.empty(sum(direction.held_sizes), dtype=self.dtype, device=self.device)
        return k, receive, self._all_to_all(receive, send, direction.held_sizes, direction.owned_sizes), send

    def _finish(self, k: int, received: Tensor, work: Work | None, sent: Tensor, values: Sequence[Tensor]) -> None:
        if work is not None:
            work.wait()
        held = self._buckets[k].to_holders.held
        targets = [values[s][offset : offset + numel] for s, offset, numel in held]
        if targets:
            torch._foreach_copy_(targets, list(received.split([numel for _, _, numel in held])))

    def _all_to_all(
        self, receive: Tensor, send: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Work | None:
        if self._ranks == 1:
            return None
        self.bytes_sent += send.numel() * send.element_size()
        return torch.distributed.all_to_all_single(
            receive, send, receive_sizes, send_sizes, group=self._world, async_op=True
        )


def _view(matrix: Tensor, rectangle: Rectangle) -> Tensor:
    rows = slice(rectangle.row, rectangle.row + rectangle.height)
    return matrix[rows, rectangle.col : rectangle.col + rectangle.width]


def _flat(values: Tensor, rectangle: Rectangle) -> Tensor:
    piece = values[rectangle.offset : rectangle.offset + rectangle.numel]
    return piece.view(rectangle.height, rectangle.width)
