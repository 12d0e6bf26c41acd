"""Memory of a rank's share of a model under each ZeRO stage: weights, masters and gradients, in bytes."""

from __future__ import annotations

import math

from megamult.zero.partition import Partition
from megamult.zero.stage3 import Zero3Partition


def weight_bytes(partition: Partition) -> int:
    """Return the bytes of the model's own parameters: the whole tensor-parallel shard, or at ZeRO 3 this rank's part.

    At ZeRO 3, small parameters that DeepSpeed keeps gathered, and those that it gathers for a layer, come on top.
    """
    if isinstance(partition, Zero3Partition):
        return sum(piece.length * piece.source.element_size() for piece in partition.slices)
    return sum(_local(partition).values())


def master_bytes(partition: Partition) -> int:
    """Return the bytes of the fp32 masters that are no parameters of the model, padding included."""
    own = {parameter.data_ptr() for parameter in partition.parameters.values()}
    masters = {piece.tensor.data_ptr(): piece.tensor for piece in partition.slices}
    return sum(each.numel() * each.element_size() for place, each in masters.items() if place not in own)


def gradient_bytes(partition: Partition, stage: int, accumulated: str, dtype: str, accumulation: int) -> int:
    """Return the largest number of bytes of gradients at any one time, without DeepSpeed's communication buckets.

    ZeRO 0 leaves them in the parameters. ZeRO 2 and 3 keep this rank's part of their sums. ZeRO 1 keeps whole sums
    while it accumulates, and this rank's part if there is nothing to accumulate; DeepSpeed's optimizer for bf16 with
    sums in fp32 always keeps whole ones.

    Args:
        stage: the ZeRO stage.
        accumulated: dtype of accumulated gradients, fp32 or bf16.
        dtype: dtype of the model, fp32 or bf16.
        accumulation: number of micro-batches of a step.
    """
    size = {"fp32": 4, "bf16": 2}[accumulated]
    if stage == 0:
        return sum(_local(partition).values())
    whole = stage == 1 and (accumulation > 1 or (dtype == "bf16" and accumulated == "fp32"))
    if whole:
        return size * sum(parameter.numel() for parameter in partition.parameters.values())
    return size * sum(piece.length for piece in partition.slices)


def _local(partition: Partition) -> dict[str, int]:
    """Return the bytes of the tensor-parallel shard of each parameter, by name."""
    grid = partition.mesh.grid
    return {cut.name: math.prod(cut.spec.local_shape(grid)) * cut.dtype.itemsize for cut in partition.cuts}
