"""What a rank holds of every logical tensor of a run, as rectangles: what a checkpoint writes, and what it reads into.

Names are `model.` and the logical name for weights (without multipliers) and multipliers, `optimizer.`, the state's
name (`exp_avg`, `exp_avg_sq`, `momentum` ...) and the logical name for state of the optimizer. They, the global shapes
and the meaning of every element are the same for any sharding.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megamult.checkpoint.chunks import Chunk
from megamult.distributed import mesh
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, even_intervals


def full_name(what: str, logical_name: str) -> str:
    """`weight` of a logical tensor is the model's, anything else the optimizer's."""
    return f"model.{logical_name}" if what == "weight" else f"optimizer.{what}.{logical_name}"


def held(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """Everything that this rank holds, replicas too: what it must read when it resumes.

    Writing to the chunks' values writes to masters and state; :meth:`TwoPhaseOptimizer.restored` then brings the model
    after them.
    """
    return list(_chunks(partition, optimizer, once=False))


def owned(partition: Partition, optimizer: TwoPhaseOptimizer) -> list[Chunk]:
    """This rank's share of everything: over all ranks each element once, and replicas shared out evenly."""
    return list(_chunks(partition, optimizer, once=True))


def _chunks(partition: Partition, optimizer: TwoPhaseOptimizer, once: bool) -> Iterator[Chunk]:
    grid = mesh.grid()
    for what, piece, values in optimizer.views(partition):
        start, length = 0, piece.length
        if once:
            if not piece.spec.counted_on(grid.tensor_rank):
                continue
            if not (partition.sharded or piece.shared):
                start, length = even_intervals(piece.length, grid.data_size)[grid.data_rank]
        yield from _of_interval(what, piece.name, piece.spec, piece.start + start, values[start : start + length])
    for what, name, values in optimizer.row_views(partition):
        yield Chunk.whole(full_name(what, name), values)
    if optimizer.folded is not None and (grid.rank == 0 or not once):
        for what, vector, values in optimizer.folded.views():
            yield Chunk.whole(full_name(what, vector.name), values)


def _of_interval(what: str, name: str, spec: ParameterSpec, start: int, values: Tensor) -> Iterator[Chunk]:
    """The logical content of elements [start, start + len(values)) of this rank's shard of a parameter."""
    grid = mesh.grid()
    for r in rectangles(spec, grid.tensor_rank, grid.tensor_size, start, values.numel()):
        part = spec.parts[r.part]
        dims = len(part.shape)
        view = values[r.offset : r.offset + r.numel].view((r.height, r.width)[:dims])
        yield Chunk.of(full_name(what, spec.logical_name(name, part)), part.shape, (r.row, r.col)[:dims], view)
