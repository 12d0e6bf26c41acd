"""State of a rank as chunks: rectangles of logical tensors, which a save writes and a load fills.

The name of a tensor is a prefix and a logical name. Weights W (not W_eff) and multipliers have the prefix `model.`.
Optimizer state has the prefix `optimizer.STATE.`, where STATE is `exp_avg`, `exp_avg_sq`, `momentum` or another name.
Names, global shapes and the meaning of every element are the same in any sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from megamult.checkpoint.chunks import Chunk
from megamult.optim.fixed_norm import NORM
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import boxes, rectangles
from megamult.zero.partition import Partition, Slice, even_intervals


def full_name(what: str, logical_name: str) -> str:
    """Return the name that a tensor has in a checkpoint.

    Args:
        what: `weight` for a weight or a multiplier, otherwise the name of the optimizer state, such as `exp_avg`.
        logical_name: name of the weight or multiplier itself, or of the one that the state belongs to.
    """
    return f"model.{logical_name}" if what == "weight" else f"optimizer.{what}.{logical_name}"


def held(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """Return chunks of all state that this rank holds, including replicas. A rank that resumes must read all of it.

    Writing to the values of these chunks changes the master weights and the optimizer state. After writing, call
    :meth:`TwoPhaseOptimizer.restored`, which updates the model.
    """
    return list(_chunks(partition, optimizer, once=False))


def owned(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """Return chunks of this rank's share of the state.

    The shares of all ranks together have each element once, even if several ranks hold it.
    """
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
    if optimizer.fixed is not None and (mesh.rank == 0 or not once):
        for name, values in optimizer.fixed.views():
            yield Chunk.whole(full_name(NORM, name), values)
    if optimizer.folded is not None and (mesh.rank == 0 or not once):
        for what, vector, values in optimizer.folded.views():
            yield Chunk.whole(full_name(what, vector.name), values)


def _of_interval(
    what: str, piece: Slice, coordinates: Coordinates, start: int, values: Tensor, once: bool
) -> Iterator[Chunk]:
    """Yield chunks of the elements [start, start + len(values)) of a process's shard of a parameter, without padding.

    If `once` is true, elements of which another process counts its copy are left out.
    """
    spec, name = piece.spec, piece.name
    for r in rectangles(spec, coordinates, start, values.numel()):
        if once and not r.counted:
            continue
        part = spec.parts[r.part]
        for box in boxes(part.shape, r):
            begin = r.offset + box.start
            view = values[begin : begin + math.prod(box.sizes)].view(box.sizes)
            yield Chunk.of(full_name(what, spec.logical_name(name, part)), part.shape, box.offsets, view)
