"""Memory of a rank's share of a model under each ZeRO stage: weights, masters and gradients, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.zero.bf16 import Bf16Partition
from megamult.zero.flat import Zero12Partition
from megamult.zero.full_precision import narrow_cuts
from megamult.zero.partition import Partition
from megamult.zero.stage3 import Zero3Partition

_FP32 = 4
_SIZES = {"fp32": 4, "bf16": 2}
"""Bytes of an element by the name of its dtype."""
_JOINED = 500_000_000
"""Elements of gradients that DeepSpeed's engine joins in one all-reduce."""
_PERSISTENT, _LIVE, _PREFETCHED = 100_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of `stage3_param_persistence_threshold`, `stage3_max_live_parameters` and
`stage3_prefetch_bucket_size`."""


def weight_bytes(partition: Partition) -> int:
    """Return the bytes of the model's own parameters: the whole tensor-parallel shard, or at ZeRO 3 this rank's part.

    At ZeRO 3, small parameters that DeepSpeed keeps gathered, and those that it gathers for a layer, come on top.
    """
    if isinstance(partition, Zero3Partition):
        return sum(piece.length * piece.source.element_size() for piece in partition.slices)
    return _shard_bytes(partition)


def master_bytes(partition: Partition) -> int:
    """Return the bytes of the fp32 masters that are no parameters of the model, padding included."""
    own = {id(parameter) for parameter in partition.parameters.values()}
    masters = {id(piece.tensor): piece.tensor for piece in partition.slices}
    return sum(each.numel() * each.element_size() for identity, each in masters.items() if identity not in own)


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
    size = _SIZES[accumulated]
    if stage == 0:
        return _shard_bytes(partition)
    whole = stage == 1 and (accumulation > 1 or (dtype == "bf16" and accumulated == "fp32"))
    if whole:
        return size * sum(parameter.numel() for parameter in partition.parameters.values())
    return size * sum(piece.length for piece in partition.slices)


def full_precision_bytes(partition: Partition) -> int:
    """Return the bytes of the fp32 copies of parameters that forward passes of a narrower model read in fp32."""
    return _FP32 * sum(partition.shards[cut.name] for cut in narrow_cuts(partition))


def gathered_bytes(partition: Partition, zero: Mapping[str, Any]) -> int:
    """Return the most bytes of whole parameters that ZeRO 3 holds at once, without this rank's parts.

    DeepSpeed keeps parameters of few elements whole. Of the others it holds as many elements as
    `stage3_max_live_parameters` says, or the whole shard, and those that it fetches ahead.

    Args:
        partition: the partition of a rank at ZeRO 3.
        zero: the section `zero_optimization` of the DeepSpeed configuration.
    """
    small = int(zero.get("stage3_param_persistence_threshold", _PERSISTENT))
    live = int(zero.get("stage3_max_live_parameters", _LIVE)) + int(
        zero.get("stage3_prefetch_bucket_size", _PREFETCHED)
    )
    sizes = partition.shards.values()
    kept = sum(size for size in sizes if size <= small)
    return _itemsize(partition) * (kept + min(sum(sizes) - kept, live))


def reduction_bytes(partition: Partition, stage: int, accumulated: str, zero: Mapping[str, Any]) -> int:
    """Return the bytes of the buffers through which gradients are reduced, an upper bound.

    ZeRO 2 and 3 fill a bucket in the model's dtype (with `overlap_comm` another while the first is reduced), and copy
    it, or a gradient that is larger than a bucket, to the dtype of the sums. ZeRO 0 and 1 join gradients of up to half
    a billion elements; in bf16 with sums in fp32, ZeRO 1 averages them where they are.

    Args:
        partition: the partition of a rank.
        stage: the ZeRO stage.
        accumulated: dtype of accumulated gradients, fp32 or bf16.
        zero: the section `zero_optimization` of the DeepSpeed configuration.
    """
    if partition.mesh.size_of("data") == 1 or isinstance(partition, Bf16Partition):
        return 0
    sizes = partition.shards.values()
    summed = _SIZES[accumulated]
    if stage < 2:
        return summed * min(sum(sizes), _JOINED)
    bucket = min(int(zero["reduce_bucket_size"]), sum(sizes))
    own = _itemsize(partition)
    copy = summed * min(max(bucket, *sizes), sum(sizes)) if summed != own else 0
    return own * bucket * (2 if zero.get("overlap_comm") else 1) + copy


def flattened_bytes(partition: Partition, accumulated: str) -> int:
    """Return the bytes of a param group's gradients in one tensor, which DeepSpeed's ZeRO 1 and 2 make before they
    update the group. Its optimizer for bf16 with sums in fp32 at ZeRO 1 has them in one tensor from the beginning."""
    if not isinstance(partition, Zero12Partition):
        return 0
    largest = max((piece.tensor.numel() for piece in partition.slices), default=0)
    return largest * _SIZES[accumulated]


def largest_bytes(partition: Partition) -> int:
    """Return the bytes of the largest tensor-parallel shard of a parameter."""
    return max((partition.shards[cut.name] * cut.dtype.itemsize for cut in partition.cuts), default=0)


def _shard_bytes(partition: Partition) -> int:
    return sum(partition.shards[cut.name] * cut.dtype.itemsize for cut in partition.cuts)


def _itemsize(partition: Partition) -> int:
    """Return the bytes of an element of the widest parameter."""
    return max((cut.dtype.itemsize for cut in partition.cuts), default=0)
