"""State of a rank as chunks: the rectangles of logical tensors that a checkpoint writes, and reads into.

A name is a prefix and a logical name. The prefix is `model.` for weights (without multipliers) and multipliers, and
`optimizer.` with the state's name (`exp_avg`, `exp_avg_sq`, `momentum` ...) for optimizer state. Names, global shapes
and the meaning of every element are the same in any sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from megamult.checkpoint.chunks import Chunk
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import boxes, rectangles
from megamult.zero.partition import Partition, Slice, even_intervals


def full_name(what: str, logical_name: str) -> str:
    """Return the name in a checkpoint: `weight` of a logical tensor belongs to the model, the rest to the optimizer."""
    return f"model.{logical_name}" if what == "weight" else f"optimizer.{what}.{logical_name}"


def held(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """Return everything that this rank holds, replicas included: what it must read when it resumes.

    Writing to the chunks' values writes to masters and state; :meth:`TwoPhaseOptimizer.restored` then updates the
    model.
    """
    return list(_chunks(partition, optimizer, once=False))


def owned(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """Return this rank's share of the state: all ranks together have each element once; replicas are divided evenly."""
    return list(_chunks(partition, optimizer, once=True))


def _chunks(partition: Partition, optimizer: TwoPhaseOptimizer, once: bool) -> Iterator[Chunk]:
    mesh = partition.mesh
    for what, piece, values in optimizer.views(partition):
        start, length = 0, piece.length
        if once and not (partition.sharded or piece.shared):
            start, length = even_intervals(piece.length, mesh.size_of("data"))[mesh.rank_on("data")]
        part = values[start : start + length]
        yield from _of_interval(what, piece, mesh.coordinates, piece.start + start, part, once)
    for what, name, values in optimizer.row_views(partition):
        yield Chunk.whole(full_name(what, name), values)
    if optimizer.folded is not None and (mesh.rank == 0 or not once):
        for what, vector, values in optimizer.folded.views():
            yield Chunk.whole(full_name(what, vector.name), values)


def _of_interval(
    what: str, piece: Slice, coordinates: Coordinates, start: int, values: Tensor, once: bool
) -> Iterator[Chunk]:
    """Yield the logical content of elements [start, start + len(values)) of a process's shard of a parameter."""
    spec, name = piece.spec, piece.name
    for r in rectangles(spec, coordinates, start, values.numel()):
        if once and not r.counted:
            continue
        part = spec.parts[r.part]
        for box in boxes(part.shape, r):
            begin = r.offset + box.start
            view = values[begin : begin + math.prod(box.sizes)].view(box.sizes)
            yield Chunk.of(full_name(what, spec.logical_name(name, part)), part.shape, box.offsets, view)
