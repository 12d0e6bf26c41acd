"""fp32 values of those parameters of a bf16 model that forward passes read in fp32, such as multipliers.

Every rank has those of its tensor-parallel shard, whole, however ZeRO shards the masters over data-parallel ranks.

DeepSpeed gives all parameters of a model one dtype and shards their fp32 masters. A matrix tolerates bf16, because each
of its elements is rounded independently. A bf16 multiplier would change a whole row or column at once, in steps of 2^-8
to 2^-7 of its value, so forward passes need the fp32 value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.distributed import device
from megamult.multipliers.parameters import FULL_PRECISION
from megamult.parameters.initial import Initial

if TYPE_CHECKING:
    from megamult.zero.partition import Cut, Partition, Slice


def narrow_cuts(partition: Partition) -> list[Cut]:
    """Return the cuts of the parameters that forward passes read in fp32 and whose dtype is narrower."""
    return [cut for cut in partition.cuts if cut.spec.fp32 and cut.dtype.itemsize < 4]


class FullPrecision:
    """Packed buffer with the fp32 masters of all parameters in `narrow`, from all data-parallel ranks.

    Each of these parameters gets a view of its elements in the buffer as its attribute `full_precision_value`.

    Args:
        partition: partition that holds the masters.
        narrow: names of the parameters that are read in fp32 and have a narrower dtype; the same on every data-parallel
            rank.
    """

    def __init__(self, partition: Partition, narrow: list[str]) -> None:
        self._sharded = partition.sharded
        grid = partition.mesh.grid
        self._group = partition.group
        self._coordinates = partition.mesh.coordinates
        cuts = [cut for cut in partition.cuts if cut.name in set(narrow)]
        sizes = [torch.Size(cut.spec.local_shape(grid)).numel() for cut in cuts]
        self._values = torch.zeros(sum(sizes), dtype=torch.float32, device=device.local_device())
        views = dict(zip((cut.name for cut in cuts), self._values.split(sizes), strict=True))
        for cut in cuts:
            parameter: Parameter = partition.parameters[cut.name]
            setattr(parameter, FULL_PRECISION, views[cut.name].view(cut.spec.local_shape(grid)))
        self._held: list[tuple[Slice, Tensor]] = [
            (piece, views[piece.name][piece.start : piece.start + piece.length])
            for piece in partition.slices
            if piece.name in views
        ]

    @staticmethod
    def of(partition: Partition) -> FullPrecision | None:
        """Return the fp32 values of a partition's parameters that are read in fp32, or None if all of them are fp32."""
        narrow = [cut.name for cut in narrow_cuts(partition)]
        return FullPrecision(partition, narrow) if narrow else None

    @torch.no_grad()
    def start_at(self, initial: Initial) -> None:
        """Set the masters of multipliers to their initial values, which DeepSpeed has rounded to the model's dtype
        before it copied them. All data-parallel ranks must call this together.

        Weights that are divided by their initial multipliers are divided by the values before rounding.
        """
        for piece, _ in self._held:
            if piece.spec.side is None:
                continue
            for begin, end, value in initial.intervals(piece.spec, self._coordinates, piece.start, piece.length):
                piece.master[begin:end] = value
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current masters into the buffer. If ZeRO shards them, this takes one all-reduce over the
        data-parallel ranks."""
        if self._sharded:
            self._values.zero_()
        if self._held:
            torch._foreach_copy_([value for _, value in self._held], [piece.master for piece, _ in self._held])
        if self._sharded and self._group is not None and self._group.size() > 1:
            # Each element is held by one rank, and all others add zero to it, so the sum is exact.
            torch.distributed.all_reduce(self._values, group=self._group)
