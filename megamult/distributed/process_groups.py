"""Process groups of a grid of data-parallel x tensor-parallel ranks, as few as possible.

Megatron's `initialize_model_parallel` makes a group for every combination of its axes, and every rank takes part in
making the groups of all ranks: thousands of groups at 1,024 ranks. With two axes, a rank needs its tensor-parallel
group, its data-parallel group, and a group of this rank only, which serves the axes of size 1 (pipeline, context,
expert). These three groups take three calls per rank, however many ranks there are. If a group would hold all ranks,
the default group is used instead.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megamult.runtime.patience import ON_FILES

_FILES_TIMEOUT = datetime.timedelta(seconds=ON_FILES)
"""Time that the fastest rank may wait for the slowest rank's file system."""

_made: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...] | str, ProcessGroup]] = WeakKeyDictionary()
"""For each default group, the further groups that were made, by their ranks (or by "files"). Each group is made once
and then reused, because torch names a group after its ranks and the number of groups that this process has. A group
that is made again after others were destroyed could therefore get the name of an earlier group of the same ranks, and
read the addresses that the earlier group left in the store."""


def create(tensor: int, timeout: datetime.timedelta) -> None:
    """Make the groups of a grid in which tensor-parallel ranks are consecutive, and register them with Megatron.

    Collective over all ranks. If the default group is not bound to a device, each new group is made by its members
    alone. torch then derives the group's name from the number of groups that a process already has, so this number must
    be the same in all members.

    Args:
        tensor: tensor-parallel size; must divide the number of ranks.
        timeout: time after which a collective of a group that this call makes fails. The default group, and groups that
            an earlier call made, keep theirs.
    """
    size = torch.distributed.get_world_size()
    tensor_group = _member(
        [range(first, first + tensor) for first in range(0, size, tensor)], "tensor parallel", timeout
    )
    data_group = _member([range(first, size, tensor) for first in range(tensor)], "data parallel", timeout)
    solo_group = _member([range(rank, rank + 1) for rank in range(size)], "one rank", timeout)
    _register(tensor_group, data_group, solo_group)


def files() -> ProcessGroup:
    """Return the gloo group of all ranks for loading and saving files. Collective over all ranks on the first call.

    The group is used for nothing else, so that the collectives of a thread that saves never mix with those of training.
    """
    made = _made.setdefault(_default(), {})
    if "files" not in made:
        made["files"] = torch.distributed.new_group(backend="gloo", timeout=_FILES_TIMEOUT, group_desc="files")
    return made["files"]


def _default() -> ProcessGroup:
    group = torch.distributed.group.WORLD
    assert group is not None, "torch.distributed is not initialized"
    return group


def _member(partition: Sequence[range], description: str, timeout: datetime.timedelta) -> ProcessGroup:
    """Return this rank's group, and make it if necessary. `partition` lists the ranks of each group;
    every rank is in exactly one group."""
    default, rank = _default(), torch.distributed.get_rank()
    mine = next(tuple(ranks) for ranks in partition if rank in ranks)
    if len(mine) == default.size():
        return default
    made = _made.setdefault(default, {})
    if mine not in made:
        if _is_bound(default):
            # NCCL is already connected and can split off all groups of the partition at once.
            group = torch.distributed.split_group(
                split_ranks=[list(ranks) for ranks in partition], timeout=timeout, group_desc=description
            )
        else:
            group = torch.distributed.new_group(
                list(mine), timeout=timeout, use_local_synchronization=True, group_desc=description
            )
        assert group is not None
        made[mine] = group
    return made[mine]


def _is_bound(default: ProcessGroup) -> bool:
    """Return whether the default group is bound to a device. If it is, NCCL connected all ranks when the group was
    made, and new groups can be split off from it."""
    return default.bound_device_id is not None


def _register(tensor: ProcessGroup, data: ProcessGroup, solo: ProcessGroup) -> None:
    """Set the variables of `megatron.core.parallel_state` that its `initialize_model_parallel` sets.

    Megatron's layers and DeepSpeed (`mpu`) call the getters of that module, and Megatron has no public way to set what
    the getters return. Each variable gets the group with the ranks that Megatron's own group would have. Variables of
    gloo groups are not set, because only Megatron's own optimizer and checkpoints use them.
    """
    everyone = _default()
    for group, names in (
        (
            tensor,
            [
                "_TENSOR_MODEL_PARALLEL_GROUP",
                "_MODEL_PARALLEL_GROUP",
                "_TENSOR_AND_CONTEXT_PARALLEL_GROUP",
                "_EXPERT_TENSOR_PARALLEL_GROUP",
                "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
                "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
            ],
        ),
        (
            data,
            [
                "_DATA_PARALLEL_GROUP",
                "_DATA_PARALLEL_GROUP_WITH_CP",
                "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
                "_EXPERT_DATA_PARALLEL_GROUP",
                "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP",
            ],
        ),
        (
            solo,
            [
                "_PIPELINE_MODEL_PARALLEL_GROUP",
                "_CONTEXT_PARALLEL_GROUP",
                "_EMBEDDING_GROUP",
                "_POSITION_EMBEDDING_GROUP",
                "_EXPERT_MODEL_PARALLEL_GROUP",
            ],
        ),
        (
            everyone,
            [
                "_TENSOR_AND_DATA_PARALLEL_GROUP",
                "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
                "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
            ],
        ),
    ):
        for name in names:
            setattr(parallel_state, name, group)
    for group, names in (
        (tensor, ["_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS", "_MODEL_PARALLEL_GLOBAL_RANKS"]),
        (data, ["_DATA_PARALLEL_GLOBAL_RANKS", "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP"]),
        (
            solo,
            [
                "_PIPELINE_GLOBAL_RANKS",
                "_CONTEXT_PARALLEL_GLOBAL_RANKS",
                "_EMBEDDING_GLOBAL_RANKS",
                "_POSITION_EMBEDDING_GLOBAL_RANKS",
                "_EXPERT_MODEL_PARALLEL_RANKS",
            ],
        ),
    ):
        for name in names:
            setattr(parallel_state, name, torch.distributed.get_process_group_ranks(group))
    # None stands for the default group.
    parallel_state._global_process_group_list = [
        None,
        *(each for each in dict.fromkeys((tensor, data, solo)) if each is not everyone),
    ]
    parallel_state._set_global_memory_buffer()
