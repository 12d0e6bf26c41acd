"""A whole checkpoint directory: verify it, read it into chunks or tensor by tensor, and write a new one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megamult.checkpoint import directory
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.index import INDEX
from megamult.checkpoint.info import INFO, CheckpointInfo
from megamult.checkpoint.planners import ChunkLoadPlanner, ChunkSavePlanner
from megamult.checkpoint.storage import FILE_BYTES, ShardReader, ShardWriter, digest, read_sums


class SavedCheckpoint:
    """A complete checkpoint directory.

    Args:
        path: the directory that holds checkpoint.json.

    Attributes:
        info: facts about the run that wrote the checkpoint.
        shapes: global shape of every tensor, by name.

    Raises:
        ValueError: the directory is no checkpoint, or its checkpoint.json or index.json is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ValueError(f"there is no checkpoint {path}: give a directory that holds {INFO}")
        self._sums = read_sums(path)
        for name in (INFO, INDEX):  # small files, which decide what is read next
            self._check(name)
        try:
            self.info = CheckpointInfo.from_json((path / INFO).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / INFO} cannot be read: {error}") from None
        self._reader = ShardReader(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, stored in self._reader.read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            self.shapes[name], self._dtypes[name] = tuple(stored.size), stored.properties.dtype

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Check that the files have the checksums with which they were written.

        Args:
            share: (k, n) to check only files k, k + n, k + 2n, ..., counted from 0, so that n processes share the work.

        Raises:
            ValueError: a file is missing, truncated or changed.
        """
        for name in sorted(self._sums)[share[0] :: share[1]]:
            self._check(name)

    def _check(self, name: str) -> None:
        path, expected = self.path / name, self._sums.get(name)
        try:
            found = digest(path)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): the checkpoint is damaged, or this user may not read it"
            ) from None
        if found != expected:
            raise ValueError(
                f"{path} has another checksum than when it was written (now {found[:12]}..., {path.stat().st_size} "
                f"bytes; then {str(expected)[:12]}...): the checkpoint is damaged"
            )

    def files(self, folder: str) -> dict[str, bytes]:
        """Return {`folder/name`: content} of the files in a folder of the checkpoint, or {} if it has no such folder.

        If `folder` is the name of a file, return {name: content} of this file.
        """
        return {name: (self.path / name).read_bytes() for name in self._sums if Path(name).parts[0] == folder}

    def load(self, chunks: Sequence[Chunk], group: ProcessGroup | None = None) -> None:
        """Read values from the checkpoint into the chunks, in place. Collective over `group` if it is given.

        Raises:
            ValueError: the checkpoint lacks a tensor, or has it with another shape.
        """
        with _plainly(group):
            load(
                {},
                storage_reader=self._reader,
                planner=ChunkLoadPlanner(chunks),
                process_group=group,
                no_dist=group is None,
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor, or the whole tensor, on the CPU, in the dtype in which it was saved."""
        shape = self.shapes[name]
        length = (shape[0] if stop is None else stop) - start
        values = torch.empty((length, *shape[1:]), dtype=self._dtypes[name])
        self.load([Chunk.of(name, shape, (start, *(0 for _ in shape[1:])), values)])
        return values


def write(
    path: Path,
    chunks: Iterable[Chunk],
    info: CheckpointInfo,
    files: Mapping[str, bytes],
    *,
    group: ProcessGroup | None = None,
    complete: Callable[[], None] = lambda: None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a checkpoint, under a temporary name until it is complete. Collective over `group` if it is given.

    Args:
        path: final path of the checkpoint. An existing checkpoint is replaced.
        chunks: chunks of this process. All processes together must have each element once. A chunk's values are
            loaded only when the file that gets them is written.
        info: content of checkpoint.json. Only the first rank's is written.
        files: {name: content} of further files. Only the first rank's are written.
        group: a group that communicates between CPUs, or None if only this process writes.
        complete: function that the first rank calls once the directory has its final name.
        file_bytes: largest size of the tensors in one file, in bytes. A larger chunk has its own file.

    Raises:
        ValueError, OSError, RuntimeError: writing failed on a rank. Every rank of the group raises the error.
    """
    temporary = directory.temporary(path)

    def rename() -> None:
        directory.replace(temporary, path)
        complete()

    writer = ShardWriter(temporary, {**files, INFO: info.to_json()}, rename, file_bytes)
    with _plainly(group):
        save(
            {},
            storage_writer=writer,
            planner=ChunkSavePlanner(list(chunks)),
            process_group=group,
            no_dist=group is None,
        )


@contextlib.contextmanager
def _plainly(group: ProcessGroup | None) -> Iterator[None]:
    """Context for torch's save and load: raise one error, that of the lowest rank that failed, and not torch's list.

    Without a group, also suppress torch's warning about saving or loading in a single process.
    """
    with contextlib.ExitStack() as stack:
        if group is None:  # filters hold for all threads: a background thread must not change them
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        try:
            yield
        except CheckpointException as failed:
            rank, (cause, _) = min(failed.failures.items(), key=lambda item: item[0])
            if group is None and not isinstance(cause, Exception):
                raise cause from None  # KeyboardInterrupt and SystemExit, which torch catches too
            kind = next((kind for kind in (ValueError, OSError) if isinstance(cause, kind)), RuntimeError)
            where = "" if group is None else f"rank {rank}: "
            raise kind(f"{where}{str(cause) or type(cause).__name__}") from cause
