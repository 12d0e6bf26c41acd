"""The second hinge beside the layout: flat intervals of parameters, with their masters and reduced gradients."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import counted_intervals
from megamult.parameters.spec import ParameterSpec
from megamult.zero.full_precision import FullPrecision


@dataclass(frozen=True)
class Cut:
    """How the data-parallel ranks share one parameter: the same on every rank, and for every tensor-parallel shard."""

    name: str
    spec: ParameterSpec
    intervals: tuple[tuple[int, int], ...]
    """(start, length) in the flattened tensor-parallel shard, by data-parallel rank; length 0: holds nothing."""
    dtype: torch.dtype
    """Of the model's parameter."""

    def held_by(self, coordinates: Coordinates) -> tuple[int, int]:
        """Return the interval (start, length) that a process holds."""
        return self.intervals[coordinates.data]


def flat_intervals(offset: int, numel: int, partition_size: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Of a parameter that begins at `offset` in a flat buffer, of which rank d holds the d-th `partition_size`."""
    intervals = []
    for rank in range(ranks):
        start = min(max(rank * partition_size - offset, 0), numel)
        stop = min(max((rank + 1) * partition_size - offset, 0), numel)
        intervals.append((start, stop - start))
    return tuple(intervals)


def even_intervals(numel: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Of a parameter that is cut by itself into pieces of one size, the last ones possibly shorter or empty."""
    return flat_intervals(0, numel, -(-numel // ranks), ranks)


def buckets(sizes: Sequence[int], elements: int) -> list[slice]:
    """Consecutive items of these sizes, together at most `elements` in a bucket, or one item."""
    bounds: list[int] = []
    filled = 0
    for i, size in enumerate(sizes):
        if not bounds or filled + size > elements:
            bounds.append(i)
            filled = 0
        filled += size
    return [slice(first, last) for first, last in itertools.pairwise([*bounds, len(sizes)])]


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + length) of the flattened tensor-parallel shard of one parameter."""

    name: str
    spec: ParameterSpec
    start: int
    length: int
    tensor: Tensor
    """What the optimizer updates, and keys its state by: fp32 masters of one or many slices."""
    offset: int
    """Where the slice begins in the flattened `tensor`."""
    source: Tensor
    """[length] view of the model's own values of the same elements, in the model's dtype."""
    shared: bool = False
    """All data-parallel ranks hold `tensor` whole, and this slice is this rank's share of it."""

    @property
    def kept(self) -> tuple[int, int]:
        """(offset, size): where in a buffer of which size this rank keeps state that is kept once over data-parallel
        ranks. As `tensor` itself where ZeRO cuts that; this slice alone where it is shared."""
        return (0, self.length) if self.shared else (self.offset, self.tensor.numel())

    @property
    def master(self) -> Tensor:
        """[length] view of the fp32 master weights."""
        return self.tensor.detach().view(-1)[self.offset : self.offset + self.length]


class Partition(ABC):
    """What one rank's optimizer updates, seen the same way for every ZeRO class.

    `sharded` says whether data-parallel ranks hold different slices (ZeRO 1 to 3) or all hold all (ZeRO 0).
    """

    slices: list[Slice]
    """What this rank holds."""
    cuts: list[Cut]
    """What every rank holds: every parameter, in an order that is the same on all ranks."""
    sharded: bool
    mesh: Mesh
    group: ProcessGroup | None
    """The processes that ZeRO cuts parameters over; None: this is the only one."""
    parameters: dict[str, Parameter]
    """The model's, by name."""
    full_precision: FullPrecision | None = None
    """Kept where the model's multipliers are narrower than their masters."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The reduced gradient of each slice, [length] each, aligned with `slices`.

        Valid between the backward pass of the last micro-batch and DeepSpeed's `step`. They are views: writing to
        them changes what the optimizer will be given.
        """

    def counted(self, piece: Slice) -> list[tuple[int, int]]:
        """Return the parts of a slice whose copies on this process count in a sum over all processes, as (start,
        length) from its beginning. Of copies on several processes the first one counts."""
        coordinates = self.mesh.coordinates
        if not (self.sharded or piece.shared) and coordinates.data != 0:
            return []
        return counted_intervals(piece.spec, coordinates, piece.start, piece.length)

    @torch.no_grad()
    def publish(self) -> None:
        """The masters were written to: give the whole model their values, as after a step. Collective."""
        for piece in self.slices:
            piece.source.copy_(piece.master)
        self.spread()
        self.stepped()

    def stepped(self) -> None:
        """Bring the masters of multipliers to every forward pass, once they have changed. Collective."""
        if self.full_precision is not None:
            self.full_precision.refresh()

    def spread(self) -> None:  # noqa: B027
        """This rank's slices of the model were written to: bring them to all ranks that hold them."""

    def complete(self, dtype: torch.dtype, bucket_elements: int) -> int:
        """Bring gradients that one rank has changed to all that hold them; returns the bytes that this rank sent."""
        return 0

    def release(self) -> None:  # noqa: B027
        """The step is done: undo what `gradients` arranged."""

    def read_back(self, piece: Slice) -> Tensor | None:
        """The masters of the slice as DeepSpeed's own accessor finds them; None: DeepSpeed has none here."""
        return None

    def check(self) -> None:
        """Prove the map from slices to masters, where weights are random and where (multipliers) they are all alike.

        A slice's master must hold the values of the parameter that it claims to be; and a pattern written to it
        through our map must be what DeepSpeed's own accessor reads back for that parameter, bit by bit.

        Raises:
            RuntimeError: it does not, as after a change inside DeepSpeed.
        """
        for piece in self.slices:
            # Equal where both are NaN too: weights that a checkpoint will bring.
            if not torch.allclose(piece.master.to(piece.source.dtype), piece.source, rtol=0, atol=0, equal_nan=True):
                raise self._mismatch(piece, "hold other values")
            before = piece.master.clone()
            count = torch.arange(1, piece.length + 1, dtype=torch.int32, device=before.device)
            piece.master.copy_(count.view(torch.float32))
            try:
                seen = self.read_back(piece)
                if seen is not None and not torch.equal(seen.detach().view(-1).view(torch.int32), count):
                    raise self._mismatch(piece, "are not the ones that DeepSpeed itself takes for them")
            finally:
                piece.master.copy_(before)

    def _mismatch(self, piece: Slice, fact: str) -> RuntimeError:
        import deepspeed

        return RuntimeError(
            f"DeepSpeed {deepspeed.__version__}, {type(self).__name__}: the master weights at the place of "
            f"{piece.name}[{piece.start}:{piece.start + piece.length}] {fact}: this version lays out its partitions "
            "differently; install the version in constraints.txt"
        )
