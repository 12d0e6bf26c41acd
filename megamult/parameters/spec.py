"""Spec of a parameter: its logical tensors, how mesh axes shard it, and what an optimizer does with it.

Megatron stores several logical tensors in one parameter (Q, K and V interleaved per query group; gate and up; Mamba-2's
z, x, B, C and dt; a stack of experts) and shards the stored tensor over mesh axes. The code that creates a parameter
states its :class:`ParameterSpec` on it, once. Param groups, Muon, clipping, checkpoints, export and monitoring read the
spec, and guess no shape, sharding or role from names or local shapes.

A stored tensor of n dimensions is read as rows and columns. Its last dimension gives the columns, and all other
dimensions together give the rows, in row-major order. A vector has one column. The spec maps global rows to logical
tensors, so it is also valid if a shard begins or ends inside a query group ``[q ... q k v]``.

The module does not use torch.distributed, so one process can test any grid.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megamult.parameters.axes import MODEL_AXES, Axis, Coordinates, Grid
from megamult.parameters.shards import Interval, Sharding, check_shardings, cols_of, joined, rows_of

Side = Literal["row", "col", "scalar"]
Role = str
"""Name of an entry of :data:`megamult.parameters.roles.ROLES`."""


@dataclass(frozen=True)
class Part:
    """One logical tensor of a parameter: a matrix W[rows, cols], a vector, or a tensor of more dimensions."""

    name: str
    """Name that distinguishes the parts of a fused parameter ("q", "gate", ...); empty if there is only one part."""
    role: Role
    shape: tuple[int, ...]
    """Global shape, without padding."""

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions except the last, or the length of a vector."""
        return rows_of(self.shape)


@dataclass(frozen=True)
class Segment:
    """Stored rows [start, start + length), which are rows [part_start, part_start + length) of part number `part`."""

    start: int
    part: int
    part_start: int
    length: int


@dataclass(frozen=True)
class ParameterSpec:
    """The logical content of one parameter, its sharding, and how it is trained.

    Raises:
        ValueError: the spec contradicts itself; the message gives fact, value and remedy.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    """Global shape of the stored tensor, with padding."""
    segments: tuple[Segment, ...]
    """Segments of all parts, in ascending order of stored rows. Stored rows that are in no segment are padding."""
    shardings: tuple[Sharding, ...] = ()
    """Shardings; each axis and each dimension is in at most one. Along an axis that is in none, the parameter is
    replicated."""
    orthogonalize: bool = False
    """Whether the parts are matrices that Muon and similar optimizers train. AdamW trains all other parameters."""
    decay: bool = True
    """Whether weight decay applies to the parameter."""
    fp32: bool = False
    """Whether forward passes read the parameter's fp32 value if the model's dtype is narrower
    (:mod:`megamult.zero.full_precision`)."""
    reduce_over: tuple[Axis, ...] = ()
    """Axes over which the optimizer step must still sum the gradient that backward leaves. Along such an axis the whole
    parameter is replicated, or blocks of it have copies (`Block.pieces`), over which the step then sums. If a sharded
    parameter has copies and does not name the axis here, backward must give all copies the same, complete gradient."""
    side: Side | None = None
    """Side of a matrix that the parameter scales, or None if the parameter is no multiplier."""
    shared: bool = False
    """Whether all parts are one vector, which is stored once for each part. Backward then leaves the vector's whole
    gradient at every part, and norms and numbers of parameters include only the first part."""
    compact: bool = False
    """Whether a process stores only the rows of its segments, without gaps between them. All processes then have the
    same local length, the largest that one of them needs. Rows after a process's last segment are unused."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def kind(self) -> str:
        """Name of the parameter's param group.

        A multiplier is in "multiplier", an orthogonalized parameter in "matrix", and any other parameter without weight
        decay in "undecayed". For the rest, which AdamW trains with weight decay, the name is the roles of the parts,
        joined by "+": "embedding", for example.
        """
        if self.side is not None:
            return "multiplier"
        if self.orthogonalize:
            return "matrix"
        return "+".join(dict.fromkeys(part.role for part in self.parts)) if self.decay else "undecayed"

    def parts_with(self, sides: dict[Role, frozenset[Side]], side: Side) -> list[int]:
        """Return the indices of the parts that have multipliers on `side`. `sides` is the placement: it maps each role
        to the sides on which matrices of that role have multipliers."""
        return [i for i, part in enumerate(self.parts) if side in sides.get(part.role, frozenset())]

    @cached_property
    def numel_logical(self) -> int:
        """Number of elements of all logical tensors, without padding. A shared vector counts once."""
        return sum(math.prod(part.shape) for part in (self.parts[:1] if self.shared else self.parts))

    def logical_name(self, parameter_name: str, part: Part) -> str:
        """Return the name of a logical tensor: `a.linear_qkv.weight` and part `q` give `a.linear_qkv.q.weight`."""
        if not part.name:
            return parameter_name
        module, _, leaf = parameter_name.rpartition(".")
        return ".".join(filter(None, (module, part.name, leaf)))

    @property
    def cols(self) -> int:
        """Number of columns of the stored tensor."""
        return cols_of(self.shape)

    def dim_over(self, axis: Axis) -> int | None:
        """Return the dimension that an axis shards, or None if the parameter is replicated along the axis."""
        return next((sharding.dim for sharding in self.shardings if sharding.axis == axis), None)

    def check(self, grid: Grid) -> None:
        """Check that a grid can shard the parameter.

        Raises:
            ValueError: an axis has a size that cannot cut a block into equal pieces.
        """
        for sharding in self.shardings:
            sharding.check(grid.size_of(sharding.axis), self._named())

    def local_shape(self, grid: Grid) -> tuple[int, ...]:
        """Return the shape of one process's shard, which is the same on every process.

        Raises:
            ValueError: the grid cannot shard the parameter.
        """
        if self.compact:
            lengths = [self.local_rows(shard) for shard in self._shards(grid)]
            return (max(lengths),)
        self.check(grid)
        shape = list(self.shape)
        for sharding in self.shardings:
            shape[sharding.dim] = sum(each.length for each in sharding.held(0, grid.size_of(sharding.axis)))
        return tuple(shape)

    def local_rows(self, coordinates: Coordinates) -> int:
        """Return the number of rows that a process holds, without padding."""
        return sum(segment.length for segment in self.local_segments(coordinates))

    def local_segments(self, coordinates: Coordinates) -> tuple[Segment, ...]:
        """Return the segments of a process's shard in local order. The `start` of each is a local row."""
        return self._local(coordinates)[0]

    def counted_segments(self, coordinates: Coordinates) -> tuple[bool, ...]:
        """Return, for each segment of :meth:`local_segments`, whether a sum over processes, such as a norm's sum of
        squares, includes this process's copy of it. Of several copies the sum includes one (:meth:`row_intervals`)."""
        return self._local(coordinates)[1]

    def local_cols(self, coordinates: Coordinates) -> tuple[int, int]:
        """Return the first column and the number of columns of a process's shard."""
        if len(self.shape) == 1:
            return 0, 1
        (interval,) = self._along(len(self.shape) - 1, coordinates)
        return interval.start, interval.length

    def row_intervals(self, coordinates: Coordinates) -> list[Interval]:
        """Return the global rows that a process holds, including padding, in local order.

        Only this method decides which copy a sum over processes, such as a norm's sum of squares, includes. If several
        processes hold the same rows, the sum includes the copy of the process that comes first along each axis.

        Raises:
            ValueError: the grid cannot shard the parameter.
        """
        self.check(coordinates.grid)
        counted = all(
            coordinates.on(axis)[0] == 0 for axis in MODEL_AXES if self.dim_over(axis) is None
        )  # of the replicas along an axis, the first one counts
        if len(self.shape) > 1:
            (columns,) = self._along(len(self.shape) - 1, coordinates)
            counted = counted and columns.counted
        found = [(0, 1, counted)]  # (start, length, counted), as flat indices over the dimensions read so far
        for dim, size in enumerate(self.shape[:-1] if len(self.shape) > 1 else self.shape):
            along = self._along(dim, coordinates)
            if len(along) == 1 and along[0].length == size:
                found = [(start * size, length * size, first and along[0].counted) for start, length, first in found]
            else:
                found = [
                    (index * size + interval.start, interval.length, first and interval.counted)
                    for start, length, first in found
                    for index in range(start, start + length)
                    for interval in along
                ]
        return joined(found)

    def _along(self, dim: int, coordinates: Coordinates) -> list[Interval]:
        sharding = next((each for each in self.shardings if each.dim == dim), None)
        if sharding is None:
            return [Interval(0, self.shape[dim], 0, True)]
        return sharding.held(*coordinates.on(sharding.axis))

    def _local(self, coordinates: Coordinates) -> tuple[tuple[Segment, ...], tuple[bool, ...]]:
        key = tuple(coordinates.on(axis) for axis in MODEL_AXES)
        if key not in self._cache:
            self._cache[key] = self._make_local(coordinates)
        return self._cache[key]

    @cached_property
    def _cache(self) -> dict[tuple[tuple[int, int], ...], tuple[tuple[Segment, ...], tuple[bool, ...]]]:
        """Results of :meth:`_make_local` by (rank, size) along each model axis. They are cached, because the planning
        of a large run asks for the same ones repeatedly."""
        return {}

    def _make_local(self, coordinates: Coordinates) -> tuple[tuple[Segment, ...], tuple[bool, ...]]:
        starts = [segment.start for segment in self.segments]
        local: list[Segment] = []
        counted: list[bool] = []
        position = 0
        for rows in self.row_intervals(coordinates):
            for i in range(max(0, bisect_right(starts, rows.start) - 1), len(starts)):
                segment = self.segments[i]
                if segment.start >= rows.start + rows.length:
                    break
                start = max(segment.start, rows.start)
                length = min(segment.start + segment.length, rows.start + rows.length) - start
                if length > 0:
                    at = position if self.compact else rows.local + start - rows.start
                    local.append(Segment(at, segment.part, segment.part_start + start - segment.start, length))
                    counted.append(rows.counted)
                    position += length
        return tuple(local), tuple(counted)

    def _shards(self, grid: Grid) -> Iterable[Coordinates]:
        """Yield the coordinates of one process for each different shard."""
        sizes: dict[str, int] = {each.axis: grid.size_of(each.axis) for each in self.shardings}
        for ranks in itertools.product(*(range(size) for size in sizes.values())):
            yield Coordinates(grid, **dict(zip(sizes, ranks, strict=True)))

    def _named(self) -> str:
        roles = ", ".join(dict.fromkeys(part.role for part in self.parts))
        return f"a parameter {self.shape} of role {roles}"


def _check(spec: ParameterSpec) -> None:
    """Raise a ValueError for a spec that contradicts itself."""
    what = f"the spec of a parameter {spec.shape}"
    if not spec.shape or min(spec.shape) < 1:
        raise ValueError(f"{what} is empty: its shape needs at least one dimension, and every size must be at least 1")
    if not spec.parts:
        raise ValueError(f"{what} has no part: name the logical tensors that it holds")
    names = [part.name for part in spec.parts]
    if len(set(names)) != len(names):
        raise ValueError(f"{what} has parts with the names {names}: give each part a different name")
    for part in spec.parts:
        fits = len(part.shape) > 0 and min(part.shape) > 0 and cols_of(part.shape) == spec.cols
        if not fits or (len(part.shape) == 1) != (len(spec.shape) == 1):
            raise ValueError(
                f"{what} has the part {part.name!r} of shape {part.shape}: the parts of a matrix must have "
                "the parameter's last dimension and at least one row, and the parts of a vector must be vectors, of "
                "any length above 0"
            )
    _check_segments(spec, what)
    check_shardings(spec.shape, spec.shardings, spec.reduce_over, what)
    if spec.orthogonalize and any(len(part.shape) != 2 for part in spec.parts):
        shapes = ", ".join(str(part.shape) for part in spec.parts)
        raise ValueError(
            f"{what} is orthogonalized and has parts of shape {shapes}: a matrix has two dimensions; state "
            "orthogonalize=False"
        )
    if spec.orthogonalize and sum(segment.length for segment in spec.segments) != rows_of(spec.shape):
        raise ValueError(
            f"{what} is orthogonalized, and its parts hold only {sum(s.length for s in spec.segments)} of its "
            f"{rows_of(spec.shape)} rows: padding cannot be orthogonalized; add a part for the other rows, or state "
            "orthogonalize=False"
        )
    if spec.shared and len({part.shape for part in spec.parts}) > 1:
        raise ValueError(
            f"{what} is shared and has parts of shape {', '.join(str(part.shape) for part in spec.parts)}: shared "
            "parts are copies of the same vector; give all parts the same shape, or state shared=False"
        )
    if (spec.side is not None or spec.compact) and (len(spec.shape) != 1 or spec.orthogonalize):
        raise ValueError(
            f"{what} has compact=True or a side, which only multipliers have, and a multiplier is a vector with "
            "orthogonalize=False: give it one dimension and orthogonalize=False, or leave out compact and side"
        )


def _check_segments(spec: ParameterSpec, what: str) -> None:
    """Check that each stored row belongs to at most one part, and that every row of a part is stored once."""
    position, rows = 0, rows_of(spec.shape)
    for segment in spec.segments:
        if not 0 <= segment.part < len(spec.parts):
            raise ValueError(
                f"{what} has a segment of part {segment.part}, but has {len(spec.parts)} parts: give a part's number "
                f"from 0 to {len(spec.parts) - 1}"
            )
        if segment.length < 1 or segment.start < position or segment.start + segment.length > rows:
            raise ValueError(
                f"{what} has a segment of rows [{segment.start}:{segment.start + segment.length}], but the "
                f"segments before it end at row {position} of {rows} rows in all: segments "
                "must be in ascending order, within the rows, and not overlap"
            )
        position = segment.start + segment.length
    for index, part in enumerate(spec.parts):
        held = sorted((s.part_start, s.length) for s in spec.segments if s.part == index)
        if not held:
            raise ValueError(
                f"{what} has the part {part.name!r} and no segment of it: add segments of its rows, or remove the part"
            )
        each_once = f"the segments of this part must hold each of its {part.rows} rows once"
        expected = 0
        for start, length in [*held, (part.rows, 0)]:
            if start < 0 or start + length > part.rows:
                raise ValueError(
                    f"{what} has a segment of rows [{start}:{start + length}] of the part {part.name!r}, which has "
                    f"only rows [0:{part.rows}]: {each_once}"
                )
            if start != expected:
                fact = "twice" if start < expected else "nowhere"
                raise ValueError(
                    f"{what} holds row {min(start, expected)} of the part {part.name!r} {fact}: {each_once}"
                )
            expected = start + length
