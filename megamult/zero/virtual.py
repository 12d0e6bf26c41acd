"""Division of parameters over data-parallel ranks at ZeRO 0, where each rank holds all parameters.

Work and optimizer state that need not be repeated on every rank are thus divided: each rank does and stores only its
share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Cut, Partition, Slice, buckets, even_intervals


def kept_once(partition: Partition, select: Callable[[ParameterSpec], bool]) -> Partition:
    """Return a partition in which exactly one data-parallel rank holds each element of the selected parameters."""
    return partition if partition.sharded else VirtualPartition(partition, select)


class VirtualPartition(Partition):
    """Partition at ZeRO 0, where every data-parallel rank holds all elements of all parameters.

    It cuts selected parameters evenly over the data-parallel ranks: the slices of a rank are its share.

    Args:
        whole: partition in which every data-parallel rank holds all elements.
        select: function that takes a parameter's spec and returns whether this partition includes the parameter.
    """

    sharded = True

    def __init__(self, whole: Partition, select: Callable[[ParameterSpec], bool]) -> None:
        self._whole = whole
        self.mesh, self.group = whole.mesh, whole.group
        ranks, rank = self.mesh.size_of("data"), self.mesh.rank_on("data")
        self._indices = [i for i, piece in enumerate(whole.slices) if select(piece.spec)]
        self.cuts, self.slices = [], []
        self._indices_here: list[int] = []
        for i in self._indices:
            piece = whole.slices[i]
            cut = Cut(piece.name, piece.spec, even_intervals(piece.length, ranks), piece.source.dtype)
            self.cuts.append(cut)
            start, length = cut.intervals[rank]
            if length:
                source = piece.source[start : start + length]
                self.slices.append(
                    Slice(piece.name, piece.spec, start, length, piece.tensor, start, source, shared=True)
                )
                self._indices_here.append(i)

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each slice. It is a view into the whole gradients, which every rank holds."""
        gradients = self._whole.gradients()
        return [
            gradients[i][piece.start : piece.start + piece.length]
            for i, piece in zip(self._indices_here, self.slices, strict=True)
        ]

    def complete(self, dtype: torch.dtype, bucket_elements: int) -> int:
        """Send every rank's part of the gradients to all data-parallel ranks, by all-gathers of bounded size.

        Args:
            dtype: dtype in which the gradients are sent.
            bucket_elements: largest number of elements in one all-gather, unless a single parameter has more.

        Returns:
            Number of bytes that this rank sent.
        """
        ranks = self.mesh.size_of("data")
        if ranks == 1:
            return 0
        gradients = self._whole.gradients()
        sent = 0
        sizes = [sum(length for _, length in cut.intervals) for cut in self.cuts]
        for part in buckets(sizes, bucket_elements):
            bucket = list(zip(self._indices[part], self.cuts[part], strict=True))
            widths = [max(length for _, length in cut.intervals) for _, cut in bucket]
            device = gradients[bucket[0][0]].device
            mine = torch.zeros(sum(widths), dtype=dtype, device=device)
            for (i, cut), part in zip(bucket, mine.split(widths), strict=True):
                start, length = cut.held_by(self.mesh.coordinates)
                part[:length] = gradients[i][start : start + length]
            everyone = torch.empty(ranks * mine.numel(), dtype=dtype, device=device)
            torch.distributed.all_gather_into_tensor(everyone, mine, group=self.group)
            sent += (ranks - 1) * mine.numel() * mine.element_size()
            for rank, parts in enumerate(everyone.chunk(ranks)):
                for (i, cut), part in zip(bucket, parts.split(widths), strict=True):
                    start, length = cut.intervals[rank]
                    gradients[i][start : start + length] = part[:length]
        return sent
