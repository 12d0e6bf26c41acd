"""Sharding of one dimension of a stored tensor over one axis of the process grid.

A dimension consists of blocks, each block is cut into pieces, and several processes may hold copies of one piece. The
module does not use torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamult.parameters.axes import AXES, MODEL_AXES, Axis


@dataclass(frozen=True)
class Block:
    """Consecutive indices of a dimension. An axis of n processes cuts each block independently of other blocks."""

    size: int
    pieces: int | None = None
    """Largest number of pieces that the block can be cut into, or None if n processes always cut it into n pieces. If n
    is larger than `pieces`, neighbouring processes hold copies: n / pieces of them hold the same piece. If `pieces` is
    1, the block is replicated. Megatron's query groups and Mamba's groups have copies if the tensor-parallel size
    exceeds the number of groups. All copies must have the same gradient when backward ends, or each a part of it
    (`ParameterSpec.reduce_over`)."""

    def cuts(self, processes: int) -> int:
        """Return the number of different pieces into which this many processes cut the block."""
        return processes if self.pieces is None else min(processes, self.pieces)


@dataclass(frozen=True)
class Sharding:
    """Sharding of one dimension over one axis.

    Each block is cut into equal pieces. A process holds one piece of every block, in the order of the blocks. If a
    block has as many pieces as the axis has processes, rank p holds piece p. If it has fewer, neighbouring ranks hold
    copies of the same piece.
    """

    axis: Axis
    dim: int
    blocks: tuple[Block, ...]

    def held(self, rank: int, processes: int) -> list[Interval]:
        """Return the indices that the process with this rank along the axis holds, in local order."""
        found, first = [], 0
        for block in self.blocks:
            cuts = block.cuts(processes)
            copies, piece = processes // cuts, block.size // cuts
            found.append((first + rank // copies * piece, piece, rank % copies == 0))
            first += block.size
        return joined(found)

    def check(self, processes: int, what: str) -> None:
        """Check that this many processes can cut every block.

        Raises:
            ValueError: a block cannot be cut equally. `what` names the parameter in the message.
        """
        for block in self.blocks:
            cuts = block.cuts(processes)
            if block.size % cuts or processes % cuts:
                pieces = "" if block.pieces is None else f", which can be cut into at most {block.pieces} pieces"
                raise ValueError(
                    f"dimension {self.dim} of {what} has a block of size {block.size}{pieces}, and the {self.axis} "
                    f"axis has {processes} processes: choose a {self.axis}-parallel size with which all pieces "
                    "are equal and equally many processes hold each of them"
                )


@dataclass(frozen=True)
class Interval:
    """Indices [start, start + length) along one dimension of the global tensor, or along its rows, which are all
    dimensions but the last, flattened. A process holds them at local indices from `local` on."""

    start: int
    length: int
    local: int
    counted: bool
    """Whether a sum over processes includes this copy. Of several copies it includes only the first."""


def cols_of(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def rows_of(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


def joined(found: Iterable[tuple[int, int, bool]]) -> list[Interval]:
    """Convert triples (start, length, counted), given in local order, to intervals.

    Consecutive triples become one interval if they are also adjacent globally and have the same `counted`
    (:attr:`Interval.counted`).
    """
    joined: list[Interval] = []
    local = 0
    for start, length, counted in found:
        last = joined[-1] if joined else None
        if last is not None and last.start + last.length == start and last.counted == counted:
            joined[-1] = Interval(last.start, last.length + length, last.local, counted)
        else:
            joined.append(Interval(start, length, local, counted))
        local += length
    return joined


def check_shardings(
    shape: Sequence[int], shardings: Sequence[Sharding], reduce_over: Sequence[Axis], what: str
) -> None:
    """Check that shardings describe shards of a tensor of this shape.

    Raises:
        ValueError: an axis or a dimension is unknown or named twice, an axis is in `shardings` and in `reduce_over`
            and no block has copies along dimension 0, blocks do not tile their dimension or have unequal pieces, or the
            columns have several blocks.
    """
    for axis in (*(each.axis for each in shardings), *reduce_over):
        if axis not in AXES:
            raise ValueError(f"{what} names the axis {axis!r}: use one of {', '.join(AXES)}")
        if axis not in MODEL_AXES:
            raise ValueError(
                f"{what} names the axis {axis}, over which ZeRO or the pipeline divides parameters, so no spec may "
                f"name it: use {', '.join(MODEL_AXES)}"
            )
    axes, dims = [each.axis for each in shardings], [each.dim for each in shardings]
    if len(set(axes)) != len(axes) or len(set(dims)) != len(dims):
        raise ValueError(
            f"{what} is sharded over the axes {axes} along the dimensions {dims}: name each axis once, and each "
            "dimension once"
        )
    if both := sorted(set(axes) & set(reduce_over)):
        sharding = next(each for each in shardings if each.axis == both[0])
        copied = any(block.pieces is not None for block in sharding.blocks)
        if not copied or sharding.dim != 0:
            why = "gradients of different shards cannot be summed, and it has no block with copies (Block.pieces)"
            if copied:
                why = f"gradients of copies are summed only along dimension 0, and this one shards {sharding.dim}"
            raise ValueError(
                f"{what} is sharded over {both[0]}, and reduce_over names the same axis: {why}; name the axis in "
                "shardings or in reduce_over, not in both"
            )
    for each in shardings:
        if not 0 <= each.dim < len(shape):
            raise ValueError(
                f"{what} is sharded along dimension {each.dim}, and has {len(shape)} dimensions: give one from 0 to "
                f"{len(shape) - 1}"
            )
        if not each.blocks or min(block.size for block in each.blocks) < 1:
            raise ValueError(
                f"the sharding of {what} over the {each.axis} axis has no blocks, or an empty block: give it blocks of "
                "size 1 or more"
            )
        total = sum(block.size for block in each.blocks)
        if total != shape[each.dim]:
            raise ValueError(
                f"{what} has blocks of total size {total} along dimension {each.dim}, whose size is {shape[each.dim]}: "
                "blocks must fill the dimension"
            )
        for block in each.blocks:
            if block.pieces is not None and (block.pieces < 1 or block.size % block.pieces):
                raise ValueError(
                    f"{what} has a block of size {block.size} with pieces={block.pieces}: pieces, the largest number "
                    "of pieces into which the block may be cut, must be at least 1 and divide the size"
                )
        if len(shape) > 1 and each.dim == len(shape) - 1 and len(each.blocks) > 1:
            raise ValueError(
                f"{what} has {len(each.blocks)} blocks along its columns, that is in the last dimension, which can "
                "have only one: divide another dimension into blocks, or make each block a parameter of its own"
            )
