"""Flat intervals of parameters with their masters and reduced gradients: one view of all ZeRO classes."""

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
    """Division of one parameter over data-parallel ranks, the same on every rank and for each tensor-parallel shard."""

    name: str
    spec: ParameterSpec
    intervals: tuple[tuple[int, int], ...]
    """Intervals (start, length) in the flattened tensor-parallel shard, by data-parallel rank; length 0: the rank holds
    nothing."""
    dtype: torch.dtype
    """dtype of the model's parameter."""

    def held_by(self, coordinates: Coordinates) -> tuple[int, int]:
        """Return the interval (start, length) that a process holds."""
        return self.intervals[coordinates.data]


def flat_intervals(offset: int, numel: int, partition_size: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Return each rank's interval (start, length) of a parameter that begins at `offset` in a flat buffer.

    Rank d holds elements [d * partition_size, (d + 1) * partition_size) of the buffer. Starts count from the
    parameter's first element; the parameter has `numel` elements. Length 0: the rank holds nothing of it.
    """
    intervals = []
    for rank in range(ranks):
        start = min(max(rank * partition_size - offset, 0), numel)
        stop = min(max((rank + 1) * partition_size - offset, 0), numel)
        intervals.append((start, stop - start))
    return tuple(intervals)


def even_intervals(numel: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Return each rank's interval (start, length) of a parameter that is cut by itself into pieces of one size; the
    last ones may be shorter or empty."""
    return flat_intervals(0, numel, -(-numel // ranks), ranks)


def buckets(sizes: Sequence[int], elements: int) -> list[slice]:
    """Return slices of consecutive items of these sizes: at most `elements` together in a bucket, or one item."""
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
    """fp32 masters of one or many slices: the tensor that the optimizer updates and keys its state by."""
    offset: int
    """First element of the slice in the flattened `tensor`."""
    source: Tensor
    """View of the model's own values of the same elements, in the model's dtype: [length]."""
    shared: bool = False
    """Whether all data-parallel ranks hold `tensor` whole, and this slice is only this rank's share of it."""

    @property
    def master(self) -> Tensor:
        """View of the fp32 master weights: [length]."""
        return self.tensor.detach().view(-1)[self.offset : self.offset + self.length]


class Partition(ABC):
    """The part of a model that one rank's optimizer updates, seen the same way for every ZeRO class.

    `sharded` says whether data-parallel ranks hold different slices (ZeRO 1 to 3) or each holds everything (ZeRO 0).
    """

    slices: list[Slice]
    """Slices that this rank holds."""
    cuts: list[Cut]
    """Cuts of every parameter, in an order that is the same on all ranks: they say what each rank holds."""
    sharded: bool
    mesh: Mesh
    group: ProcessGroup | None
    """Processes that ZeRO cuts parameters over; None: this process is the only one."""
    parameters: dict[str, Parameter]
    """Parameters of the model by name."""
    full_precision: FullPrecision | None = None
    """fp32 values of the multipliers, kept where the model's own are narrower than their masters; else None."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return the reduced gradient of each slice, [length] each, in the order of `slices`.

        They are valid between the backward pass of the last micro-batch and DeepSpeed's `step`, and they are views:
        writing to them changes the gradients that the optimizer is given.
        """

    def counted(self, piece: Slice) -> list[tuple[int, int]]:
        """Return the parts of a slice whose copies on this process count in a sum over all processes, as (start,
        length) from the beginning of the slice. Where several processes hold a copy, only the first one counts."""
        coordinates = self.mesh.coordinates
        if not (self.sharded or piece.shared) and coordinates.data != 0:
            return []
        return counted_intervals(piece.spec, coordinates, piece.start, piece.length)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the whole model the values of masters that were written to, as after a step. Collective."""
        for piece in self.slices:
            piece.source.copy_(piece.master)
        self.spread()
        self.stepped()

    def stepped(self) -> None:
        """Bring the multipliers' changed masters to the forward passes of every rank. Collective."""
        if self.full_precision is not None:
            self.full_precision.refresh()

    def spread(self) -> None:  # noqa: B027
        """Bring this rank's slices of the model, which were written to, to all ranks that hold them."""

    def complete(self, dtype: torch.dtype, bucket_elements: int) -> int:
        """Bring gradients that one rank has changed to all ranks that hold them.

        Args:
            dtype: dtype in which they are sent.
            bucket_elements: most elements that one collective brings, unless one parameter has more.

        Returns:
            Bytes that this rank sent; 0 where nothing has to be sent.
        """
        return 0

    def release(self) -> None:  # noqa: B027
        """Undo what `gradients` arranged, once the step is done."""

    def read_back(self, piece: Slice) -> Tensor | None:
        """Return the masters of the slice as DeepSpeed's own accessor finds them; None: it has no accessor here."""
        return None

    def check(self) -> None:
        """Prove the map from slices to masters, for random weights and for multipliers, which all have the same value.

        The master of a slice must hold the values of the parameter that the slice names; and a pattern that is written
        to it through our map must be what DeepSpeed's own accessor reads back for that parameter, bit by bit.

        Raises:
            RuntimeError: one of the two does not hold, for example after a change inside DeepSpeed.
        """
        for piece in self.slices:
            # NaN equals NaN here: weights that a checkpoint will bring are NaN until then.
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
