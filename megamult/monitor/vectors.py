"""All vectors of a model, complete on every rank: weights of norms, biases, and multipliers of both implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.monitor.names import by_place, layer_of, mean
from megamult.monitor.squares import pooled_rms
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import Role, Side
from megamult.zero.partition import Partition


@dataclass(frozen=True)
class Entry:
    """One logical vector, and its place among the values of :meth:`Vectors.gathered`."""

    role: Role
    side: Side | None
    """Side of a matrix that the vector scales, or None if the vector is no multiplier."""
    place: slice


class Vectors:
    """All vectors of the model, and the collective that gives every rank their complete values.

    Attributes:
        entries: the vectors by logical name, in the same order on every rank.
    """

    def __init__(self, partition: Partition, optimizer: TwoPhaseOptimizer) -> None:
        self._partition, self._optimizer = partition, optimizer
        self.entries: dict[str, Entry] = {}
        position = 0
        for cut in partition.cuts:
            if len(cut.spec.shape) > 1:
                continue
            for part in cut.spec.parts:
                place = slice(position, position := position + part.rows)
                self.entries[cut.spec.logical_name(cut.name, part)] = Entry(part.role, cut.spec.side, place)
        self._sharded = position
        if optimizer.folded is not None:
            for vector in optimizer.folded.vectors:  # every rank holds all of their values
                place = slice(position + vector.entries.start, position + vector.entries.stop)
                self.entries[vector.name] = Entry(vector.role, vector.side, place)
        self._held: list[tuple[int, int, int, int]] = []
        """Parts of this rank's slices that a sum over all ranks includes, as (index of the slice, offset in the slice,
        position in the packed values, number of elements)."""
        for i, piece in enumerate(partition.slices):
            if len(piece.spec.shape) > 1 or not partition.counted(piece):
                continue
            for r in rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length):
                if r.counted:
                    name = piece.spec.logical_name(piece.name, piece.spec.parts[r.part])
                    self._held.append((i, r.offset, self.entries[name].place.start + r.row, r.numel))

    @torch.no_grad()
    def gathered(self) -> dict[str, Tensor]:
        """Return the fp32 values of all vectors by name. Collective over all ranks."""
        packed = torch.zeros(self._sharded, device=device.local_device())
        for i, offset, position, numel in self._held:
            values = self._optimizer.weight(self._partition.slices[i])
            packed[position : position + numel] = values[offset : offset + numel]
        self._partition.mesh.sum_over(packed)  # exact, as all but one rank add zero to an element
        if self._optimizer.folded is not None:
            packed = torch.cat([packed, self._optimizer.folded.values])
        return {name: packed[entry.place] for name, entry in self.entries.items()}

    def figures(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return mean and standard deviation of ln|multiplier|, and the RMS of vectors that are no multipliers.

        Args:
            values: result of :meth:`gathered`.
        """
        if not values:
            return {}
        moments = []
        for name, entry in self.entries.items():
            wide = values[name].double()
            if entry.side is None:
                moments.append(torch.stack([wide.square().sum(), torch.full_like(wide[0], wide.numel())]))
            else:
                logs = wide.abs().log()
                moments.append(torch.stack([logs.mean(), logs.std(correction=0)]))
        table = torch.stack(moments).tolist()
        squares: list[tuple[str | None, int | None, tuple[float, int]]] = []
        logs_of: dict[str, list[tuple[str | None, int | None, float]]] = {}
        for (name, entry), (first, second) in zip(self.entries.items(), table, strict=True):
            layer = layer_of(name)
            if entry.side is None:
                squares.append((entry.role, layer, (first, int(second))))
                continue
            logs_of.setdefault(f"{entry.side}_log_mean", []).append((entry.role, layer, first))
            if entry.side != "scalar":
                logs_of.setdefault(f"{entry.side}_log_std", []).append((entry.role, layer, second))
        found = by_place("weight_rms", squares, pooled_rms)
        for metric, members in logs_of.items():
            found |= by_place(metric, members, mean)
        return found
