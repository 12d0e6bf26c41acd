"""Planners for torch.distributed.checkpoint that take :class:`Chunk` objects instead of a state dict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megamult.checkpoint.chunks import Chunk


class ChunkSavePlanner(DefaultSavePlanner):
    """Planner that writes this rank's chunks, and checks that the chunks of all ranks together tile each tensor."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {_index(chunk): chunk for chunk in chunks}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Store whether this rank coordinates. The chunks are the state, and `state_dict` is not used."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Return a plan that writes each chunk as one item."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _extent(chunk), TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape)
                    ),
                )
                for index, chunk in self._chunks.items()
            ]
        )
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Make torch's global plan, and also check that no chunk is written twice and the chunks cover each tensor.

        torch's own check does not find missing chunks if there is a single process.

        Raises:
            ValueError: chunks overlap, lie outside of their tensor, leave a part of it out, or are planned twice. torch
                itself would silently drop one of two equal chunks.
        """
        seen: set[MetadataIndex] = set()
        for index in (item.index for plan in all_plans for item in plan.items):
            if index in seen:
                raise ValueError(f"two ranks would write the same chunk: {index.fqn} at {tuple(index.offset or ())}")
            seen.add(index)
        plans, metadata = super().create_global_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            found = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if found != math.prod(tensor.size):
                raise ValueError(
                    f"{name} has {math.prod(tensor.size)} elements, and the chunks of all ranks have {found} together"
                )
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return a chunk's values."""
        return self._chunks[write_item.index].load()


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Planner that reads tensors into chunks, in place.

    The tensors may have been written in other chunks.

    Raises:
        ValueError: the checkpoint lacks a tensor, or has it with another shape.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {_index(chunk): chunk for chunk in chunks}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Store `metadata` and `is_coordinator`. The chunks are the state, and `state_dict` is not used."""
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return a plan that reads, for each chunk, the parts of stored chunks that overlap it."""
        assert self.metadata is not None
        by_name: dict[str, list[Chunk]] = defaultdict(list)
        for chunk in self._chunks.values():
            by_name[chunk.name].append(chunk)
        items: list[ReadItem] = []
        for name, chunks in by_name.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != chunks[0].shape:
                there = (
                    f"has it with the shape {tuple(stored.size)}"
                    if isinstance(stored, TensorStorageMetadata)
                    else "lacks it"
                )
                raise ValueError(f"this run has {name} with the shape {chunks[0].shape}, and the checkpoint {there}")
            items += create_read_items_for_chunk_list(name, stored, [_extent(chunk) for chunk in chunks])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of a chunk that `read_item` fills."""
        values = self._chunks[read_item.dest_index].load()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            values = values.narrow(dim, start, length)
        return values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the values were filled in place."""


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.name, chunk.offsets)


def _extent(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
