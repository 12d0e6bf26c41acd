"""The file index.json of a checkpoint. It lists the tensors, their chunks, and the file of each chunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = "index.json"


def key_of(index: MetadataIndex) -> str:
    """Return the name of a chunk in its file, `tensor@offsets`, such as `model.x.weight@128,0`."""
    assert index.offset is not None
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def to_json(metadata: Metadata, stored: Mapping[MetadataIndex, tuple[str, str]]) -> bytes:
    """Return the content of index.json.

    Args:
        metadata: torch's metadata of the chunks of all ranks.
        stored: for each chunk, (name of its file, SHA-256 of this file). The SHA-256 is not written to index.json.
    """
    tensors = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(tensor, TensorStorageMetadata)
        tensors[name] = {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "shape": list(tensor.size),
            "chunks": [
                {
                    "file": stored[MetadataIndex(name, chunk.offsets)][0],
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                }
                for chunk in tensor.chunks
            ],
        }
    return json.dumps({"tensors": tensors}).encode()


def read(path: Path) -> Metadata:
    """Read index.json as torch's metadata. Its `storage_data` maps each chunk to (file, sizes).

    Raises:
        ValueError: the file is missing or damaged, names files outside of the directory, or lists chunks that do not
            tile their tensor.
    """
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        found: dict[str, TensorStorageMetadata] = {}
        where: dict[MetadataIndex, tuple[str, torch.Size]] = {}
        for name, entry in tensors.items():
            dtype = getattr(torch, entry["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has the dtype {entry['dtype']!r}, which torch does not have")
            chunks = []
            for chunk in entry["chunks"]:
                if Path(chunk["file"]).name != chunk["file"]:
                    raise ValueError(f"{name} is in {chunk['file']!r}, outside of the directory")
                chunks.append(ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])))
                where[MetadataIndex(name, chunk["offsets"])] = (chunk["file"], chunks[-1].sizes)
            found[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
            _check_tiled(name, found[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint ({type(error).__name__}: {error})") from None
    return Metadata(found, storage_data=where)  # type: ignore[arg-type]


def _check_tiled(name: str, tensor: TensorStorageMetadata) -> None:
    """Check that the chunks of a tensor lie inside it, do not overlap and leave nothing out.

    Raises:
        ValueError: they do not.
    """
    active: list[ChunkStorageMetadata] = []
    for chunk in sorted(tensor.chunks, key=lambda chunk: tuple(chunk.offsets)):
        what = f"{name} {tuple(tensor.size)} has a chunk {tuple(chunk.sizes)} at {tuple(chunk.offsets)}"
        if len(chunk.offsets) != len(tensor.size) or any(
            start < 0 or length < 1 or start + length > size
            for start, length, size in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        ):
            raise ValueError(f"{what}, which does not lie inside the tensor")
        active = [other for other in active if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
        if any(_overlap(chunk, other) for other in active):
            raise ValueError(f"{what}, which overlaps another chunk")
        active.append(chunk)
    elements = sum(chunk.sizes.numel() for chunk in tensor.chunks)
    if elements != tensor.size.numel():
        raise ValueError(f"{name} has {tensor.size.numel()} elements, and its chunks have {elements} together")


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
