"""Flat intervals of parameters with their masters and reduced gradients, in one form for all ZeRO classes."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
    """Intervals (start, length) of the flattened tensor-parallel shard, one for each data-parallel rank. A length of 0
    means that the rank holds nothing."""
    dtype: torch.dtype
    """dtype of the model's parameter."""

    def held_by(self, coordinates: Coordinates) -> tuple[int, int]:
        """Return the interval (start, length) that a process holds."""
        return self.intervals[coordinates.data]


def flat_intervals(offset: int, numel: int, partition_size: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Return each rank's interval (start, length) of a parameter that begins at `offset` in a flat buffer.

    Rank d holds elements [d * partition_size, (d + 1) * partition_size) of the buffer. Starts count from the first
    element of the parameter, which has `numel` elements. A length of 0 means that the rank holds nothing of it.
    """
    intervals = []
    for rank in range(ranks):
        start = min(max(rank * partition_size - offset, 0), numel)
        stop = min(max((rank + 1) * partition_size - offset, 0), numel)
        intervals.append((start, stop - start))
    return tuple(intervals)


def even_intervals(numel: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Return each rank's interval (start, length) of a parameter that is cut into pieces of equal size. The last pieces
    may be shorter or empty."""
    return flat_intervals(0, numel, -(-numel // ranks), ranks)


def buckets(sizes: Sequence[int], elements: int) -> list[slice]:
    """Divide consecutive items with `sizes` elements each into buckets, and return each bucket's range of item indices.

    A bucket has at most `elements` elements in all, or is a single item that has more.
    """
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
    """Tensor of fp32 masters that holds this slice and possibly others. The optimizer updates this tensor, which is
    also the key of its state."""
    offset: int
    """Position of the slice's first element in the flattened `tensor`."""
    source: Tensor
    """View of the model's own values of the slice's elements, [length], in the model's dtype."""
    shared: bool = False
    """Whether every data-parallel rank holds the whole `tensor`, and the slice is only the part of it that this rank
    works on."""

    @property
    def master(self) -> Tensor:
        """View of the slice's fp32 masters, [length]."""
        return self.tensor.detach().view(-1)[self.offset : self.offset + self.length]


class Partition(ABC):
    """The part of a model that one rank's optimizer updates, with the same interface for every ZeRO class.

    `sharded` says whether data-parallel ranks hold different slices (ZeRO 1 to 3) or each rank holds all (ZeRO 0).
    """

    slices: list[Slice]
    """Slices that this rank holds."""
    cuts: list[Cut]
    """Cuts of all parameters, which say what each rank holds. Their order is the same on all ranks."""
    sharded: bool
    mesh: Mesh
    group: ProcessGroup | None
    """Group of the processes over which ZeRO cuts parameters, or None if this process is the only one."""
    parameters: dict[str, Parameter]
    """Parameters of the model by name."""
    full_precision: FullPrecision | None = None
    """fp32 values of the multipliers, or None if the model's own multipliers are fp32."""

    @cached_property
    def shards(self) -> dict[str, int]:
        """Number of elements of the tensor-parallel shard of each parameter, by name."""
        return {cut.name: math.prod(cut.spec.local_shape(self.mesh.grid)) for cut in self.cuts}

    def take_over(self, engine: Any, finite: Callable[[], bool]) -> None:  # noqa: B027
        """Replace parts of DeepSpeed's step by others with the same result. Called once, when an optimizer is attached.

        Args:
            engine: the DeepSpeed engine.
            finite: function that returns whether all gradients of this step are finite, after `prepare`.
        """

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return the reduced gradient of each slice, [length] each, in the order of `slices`.

        The gradients are valid between the backward pass of the last micro-batch and DeepSpeed's `step`. They are
        views, so writing to them changes the gradients that DeepSpeed gives to the optimizer.
        """

    def counted(self, piece: Slice) -> list[tuple[int, int]]:
        """Return those intervals of a slice that this process adds to a sum over all processes, as (start, length) from
        the beginning of the slice. If several processes hold copies of an element, only the first of them adds it."""
        coordinates = self.mesh.coordinates
        if not (self.sharded or piece.shared) and coordinates.data != 0:
            return []
        return counted_intervals(piece.spec, coordinates, piece.start, piece.length)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters, which have changed, into the model, and spread them, as DeepSpeed does after a step.

        Collective over all ranks.
        """
        for piece in self.slices:
            piece.source.copy_(piece.master)
        self.spread()
        self.stepped()

    def stepped(self) -> None:
        """Refresh the fp32 copies of the multipliers, which forward passes read, from the changed masters.

        It does nothing if the model's own multipliers are fp32. Collective over all ranks.
        """
        if self.full_precision is not None:
            self.full_precision.refresh()

    def spread(self) -> None:  # noqa: B027
        """Send the changed values of this rank's slices of the model to all ranks that need them."""

    def complete(self, dtype: torch.dtype, bucket_elements: int) -> int:
        """Send gradients that only this rank has changed to the ranks that hold copies of them. Collective.

        Args:
            dtype: dtype in which the gradients are sent.
            bucket_elements: largest number of elements in one collective, unless a single parameter has more.

        Returns:
            Number of bytes that this rank sent; 0 if nothing has to be sent.
        """
        return 0

    def release(self) -> None:  # noqa: B027
        """Set each `.grad` to None that :meth:`gradients` has made a view of the parameter's `main_grad`.

        Megatron's DistributedDataParallel leaves gradients in `main_grad`. This is called at the end of an optimizer
        step.
        """

    def read_back(self, piece: Slice) -> Tensor | None:
        """Return the masters of the slice as DeepSpeed's own accessor finds them, or None if DeepSpeed has no accessor
        for this class of partition."""
        return None

    def check(self) -> None:
        """Check that the slices are mapped to the right masters, in two ways.

        First, the master of a slice must hold the values of the parameter that the slice names. Second, a pattern that
        is written to the master must be what DeepSpeed's own accessor reads back for that parameter, bit by bit.
        Multipliers need the second check: they may all have the same value, and the first check would then not notice
        that their masters are mixed up.

        Raises:
            RuntimeError: one of the two checks fails, for example after a change inside DeepSpeed.
        """
        for piece in self.slices:
            # NaN must equal NaN here: weights that a checkpoint will replace are NaN until it is loaded.
            if not torch.allclose(piece.master.to(piece.source.dtype), piece.source, rtol=0, atol=0, equal_nan=True):
                raise self._mismatch(piece, "do not hold the values of the parameter")
            before = piece.master.clone()
            count = torch.arange(1, piece.length + 1, dtype=torch.int32, device=before.device)
            piece.master.copy_(count.view(torch.float32))
            try:
                seen = self.read_back(piece)
                if seen is not None and not torch.equal(seen.detach().view(-1).view(torch.int32), count):
                    raise self._mismatch(piece, "are not those that DeepSpeed itself reads for the parameter")
            finally:
                piece.master.copy_(before)

    def _mismatch(self, piece: Slice, fact: str) -> RuntimeError:
        import deepspeed

        return RuntimeError(
            f"DeepSpeed {deepspeed.__version__}, {type(self).__name__}: the master weights at the place of "
            f"{piece.name}[{piece.start}:{piece.start + piece.length}] {fact}: this version lays out its partitions "
            "differently; install the version in constraints.txt"
        )
