"""Files of a checkpoint directory, for torch.distributed.checkpoint: safetensors and JSON, checksummed and synced.

    index.json                  every tensor's dtype, global shape and chunks, and the file of each chunk
    shard_RANK_N.safetensors    chunks, under the keys NAME@OFFSETS
    checkpoint.json ...         files that the caller adds
    SHA256SUMS                  checksums of all of these, which sha256sum can check

No file contains a pickle. A directory is written under a temporary name, and renamed once it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megamult.checkpoint.index import INDEX, key_of, to_json
from megamult.checkpoint.index import read as read_index

SUMS = "SHA256SUMS"
FILE_BYTES = 1 << 30
"""Maximum bytes of a file, unless a single chunk is larger. This also limits the CPU memory for copies of GPU
tensors."""


class ShardWriter(StorageWriter):
    """Storage writer with which every rank writes its chunks, and the first rank then adds all other files.

    Args:
        directory: directory to write to. It has a temporary name, which `complete` changes.
        files: contents of other files of the directory, by name.
        complete: function that the first rank calls when everything is written and synced.
        file_bytes: maximum bytes of a file, unless a single chunk is larger.
    """

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, bytes],
        complete: Callable[[], None],
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self._directory, self._files, self._complete, self._file_bytes = directory, files, complete, file_bytes

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: no state is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the directory on the first rank, after removing one that an interrupted save has left."""
        if is_coordinator:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Put each rank's number into that rank's plan: :meth:`write_data` names its files by this number."""
        return [SavePlan(plan.items, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into files of bounded size."""
        results: list[WriteResult] = []
        for number, items in enumerate(_batches(plan.items, self._file_bytes)):
            name = f"shard_{plan.storage_data:05d}_{number:04d}.safetensors"
            path = self._directory / name
            tensors: dict[str, torch.Tensor] = {}
            memory: set[int] = set()  # safetensors refuses tensors that share memory, as columns that are shared do
            for item in items:
                values = _values(planner, item)
                tensors[key_of(item.index)] = values.clone() if values.data_ptr() in memory else values
                memory.add(values.data_ptr())
            try:
                save_file(tensors, path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{path} cannot be written: {error}") from error
            path.chmod(self._directory.stat().st_mode & 0o666)  # safetensors makes files that only the owner can read
            sync(path)
            stored = (name, digest(path))
            results += [
                WriteResult(item.index, tensor.nbytes, stored)
                for item, tensor in zip(items, tensors.values(), strict=True)
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, the other files and the checksums on the first rank, then call `complete`."""
        stored = {result.index: result.storage_data for rank in results for result in rank}
        sums = dict(stored.values())
        for name, content in {**self._files, INDEX: to_json(metadata, stored)}.items():
            path = self._directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sync(path)
            sums[name] = hashlib.sha256(content).hexdigest()
        listing = self._directory / SUMS
        listing.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")
        for path in (listing, *{(self._directory / name).parent for name in sums}):
            sync(path)
        self._complete()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept paths only."""
        return isinstance(checkpoint_id, (str, os.PathLike))


class ShardReader(StorageReader):
    """Storage reader of a directory that :class:`ShardWriter` wrote.

    Args:
        directory: a complete checkpoint directory.

    Raises:
        ValueError: index.json is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = read_index(directory / INDEX)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: no state is kept between loads."""

    def read_metadata(self) -> Metadata:
        """Return the contents of index.json."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: the reader is ready."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the regions of stored chunks that the plan lists into the planner's tensors."""
        assert self._metadata.storage_data is not None
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self._metadata.storage_data[item.storage_index][0]].append(item)
        for name, items in by_file.items():
            with safe_open(self._directory / name, framework="pt") as shard:
                for item in items:
                    stored = shard.get_slice(key_of(item.storage_index))
                    sizes = self._metadata.storage_data[item.storage_index][1]
                    if tuple(stored.get_shape()) != tuple(sizes):
                        raise ValueError(
                            f"{self._directory / name} has {key_of(item.storage_index)} of shape "
                            f"{tuple(stored.get_shape())}, and {INDEX} says {tuple(sizes)}: the checkpoint is damaged"
                        )
                    where = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item)
                    target.copy_(stored[where])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept paths only."""
        return isinstance(checkpoint_id, (str, os.PathLike))


def read_sums(directory: Path) -> dict[str, str]:
    """Read the SHA-256 of every file of a checkpoint directory, by name.

    Raises:
        ValueError: SHA256SUMS is missing or damaged, or does not list index.json.
    """
    path, sums = directory / SUMS, {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            value, _, name = line.partition("  ")
            if len(value) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"the line {line[:80]!r} is not a SHA-256 and a path inside the directory")
            sums[name] = value
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is no complete checkpoint: {SUMS} cannot be read ({error})") from None
    if INDEX not in sums:
        raise ValueError(f"{directory} is no complete checkpoint: {SUMS} does not list {INDEX}")
    return sums


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _values(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    values = planner.resolve_data(item)
    assert isinstance(values, torch.Tensor)
    return values.detach().cpu().contiguous()


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _batches(items: Sequence[WriteItem], limit: int) -> Iterator[list[WriteItem]]:
    """Group consecutive items into batches of at most `limit` bytes. A larger item is a batch by itself."""
    batch: list[WriteItem] = []
    filled = 0
    for item in items:
        if batch and filled + _bytes(item) > limit:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += _bytes(item)
    if batch:
        yield batch
