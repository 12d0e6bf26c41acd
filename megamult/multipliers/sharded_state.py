"""Multipliers in Megatron-Core's distributed checkpoints. Each logical vector has its own name and global shape."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import get_pg_rank

from megamult.multipliers.specs import LEAVES
from megamult.parameters.axes import tensor_shard
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import spec_of


def multiplier_sharded_tensors(
    module: torch.nn.Module,
    sharded: dict[str, Any],
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    tp_group: torch.distributed.ProcessGroup,
    metadata: dict[str, Any],
) -> None:
    """Put a ShardedTensorFactory for each multiplier of `module` into Megatron's `sharded` state dict, in place.

    For a save, a factory cuts the local vector into the segments of its logical vectors. In a load it joins them. A
    checkpoint can therefore be loaded at another tensor-parallel size, even if a shard of a fused weight begins or ends
    within a part.
    """
    dp_rank = get_pg_rank(metadata["dp_cp_group"])
    for leaf in LEAVES.values():
        parameter = getattr(module, leaf, None)
        if parameter is None:
            continue
        spec = spec_of(parameter)
        replica = (0, 0 if spec.dim_over("tensor") is not None else tp_group.rank(), dp_rank)
        sharded[prefix + leaf] = _factory(
            prefix + leaf, parameter, spec, sharded_offsets, tp_group.rank(), tp_group.size(), replica
        )


def _factory(
    key: str,
    parameter: torch.nn.Parameter,
    spec: ParameterSpec,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    tp_rank: int,
    tp_size: int,
    replica: tuple[int, int, int],
) -> ShardedTensorFactory:
    runs = spec.local_segments(tensor_shard(tp_rank, tp_size))
    outer_shape = tuple(count for _, _, count in sharded_offsets)
    outer_offset = tuple(index for _, index, _ in sharded_offsets)

    def build(key: str, data: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor(
                spec.logical_name(key, spec.parts[run.part]),
                data[run.start : run.start + run.length],
                data.dtype,
                (run.length,),
                (*outer_shape, spec.parts[run.part].shape[0]),
                (*outer_offset, run.part_start),
                None,
                replica_id=replica_id,
                prepend_axis_num=len(sharded_offsets),
            )
            for run in runs
        ]

    def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
        merged = torch.ones_like(parameter.detach())
        for run, piece in zip(runs, pieces, strict=True):
            merged[run.start : run.start + run.length] = piece
        return merged

    return ShardedTensorFactory(key, parameter, build, merge, replica)
