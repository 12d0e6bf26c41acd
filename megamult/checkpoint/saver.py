"""Saving of checkpoints.

By default each rank copies its state, and a thread writes the copy while training continues.

A save is collective: every rank calls it at the same step. Its collectives run between CPUs, in a process group that is
only for work on files, so that they never mix with the collectives of training.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megamult.checkpoint import directory, saved
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.distributed import device, process_groups
from megamult.distributed.mesh import Mesh

_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 29
"""Maximum bytes of a block of memory for copies. The copies are not in one large buffer, because torch rounds pinned
memory up to a power of two, which may double the buffer."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one save."""

    step: int
    path: Path
    stall_seconds: float
    """Seconds for which training waited for the save."""
    seconds: float
    """Seconds from the call of `save` until its end, including the removal of old checkpoints."""
    error: str | None
    """Message of the error, or None if the save is complete."""


class Saver:
    """Writer of a run's checkpoints into `parent`.

    Args:
        parent: the run's `checkpoints` directory, on a file system that all ranks see.
        mesh: mesh of the processes.
        keep, keep_every: see :func:`megamult.checkpoint.directory.retain`.
        asynchronous: whether to copy the state, and write the copy while training continues. The copy takes as much CPU
            memory as this rank's share of the state. If False, `save` returns after the state is written.
    """

    def __init__(
        self, parent: Path, mesh: Mesh, *, keep: int = 0, keep_every: int = 0, asynchronous: bool = True
    ) -> None:
        self.parent, self.keep, self.keep_every, self.asynchronous = parent, keep, keep_every, asynchronous
        self.group = process_groups.files()
        self._first = mesh.rank == 0
        self._blocks: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    def save(self, chunks: Sequence[Chunk], info: CheckpointInfo, files: Mapping[str, bytes]) -> Outcome | None:
        """Begin a save. If the previous one is still being written, wait for its end first.

        Args:
            chunks: this rank's share of the state (:func:`megamult.checkpoint.state.owned`).
            info: content of checkpoint.json. Only the first rank's is written.
            files: {name: content} of further files. Only the first rank's are written.

        Returns:
            If the saver is not asynchronous, the outcome of this save. If it is, the outcome of the previous save, or
            None if there was no previous save or :meth:`poll` or :meth:`wait` has already returned its outcome.
        """
        began = time.perf_counter()
        before = self.wait()
        if self.asynchronous:
            try:
                chunks = self._stage(chunks)
            except (
                RuntimeError,
                MemoryError,
            ) as error:  # the thread raises this error when it loads a chunk, so that every rank reports the error
                chunks = [_failing(chunk, error) for chunk in chunks]
            stall = time.perf_counter() - began
            self._thread = threading.Thread(
                target=self._write, args=(chunks, info, files, began, stall), name="checkpoint", daemon=True
            )
            self._thread.start()
            return before
        self._write(chunks, info, files, began, None)
        return self.poll()

    def poll(self) -> Outcome | None:
        """Return the outcome of the latest save, or None if it is still running or there was none.

        Each outcome is returned once. After :meth:`poll`, :meth:`wait` or :meth:`save` has returned it, return None.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread, outcome, self._outcome = None, self._outcome, None
        return outcome

    def wait(self, seconds: float | None = None) -> Outcome | None:
        """Wait at most `seconds` (None: without limit) until a running save ends. Return the same as :meth:`poll`."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.poll()

    def _stage(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Copy the values of the chunks into memory that the next save uses again."""
        places, sizes = _places([chunk.nbytes for chunk in chunks])
        if [block.numel() for block in self._blocks] != sizes:
            self._blocks = []  # free the old blocks before new ones are allocated
            pinned = device.has_cuda()
            self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        staged = []
        for chunk, (block, start) in zip(chunks, places, strict=True):
            copy = self._blocks[block][start : start + chunk.nbytes].view(chunk.dtype).view(chunk.sizes)
            copy.copy_(chunk.load(), non_blocking=True)
            staged.append(chunk.holding(copy))
        if device.has_cuda():
            torch.cuda.synchronize()
        return staged

    def _write(
        self,
        chunks: Sequence[Chunk],
        info: CheckpointInfo,
        files: Mapping[str, bytes],
        began: float,
        stall: float | None,
    ) -> None:
        path, error = directory.of_step(self.parent, info.step), None

        def complete() -> None:
            directory.point(self.parent, path)
            try:
                directory.retain(self.parent, info.step, self.keep, self.keep_every)
            except OSError as failed:  # the new checkpoint is complete nevertheless
                print(f"warning: an old checkpoint could not be removed ({failed})", file=sys.stderr, flush=True)

        try:
            saved.write(path, chunks, info, files, group=self.group, complete=complete)
        except Exception as cause:  # no error here may end training
            error = str(cause) or type(cause).__name__
        if error is not None and self._first:
            with contextlib.suppress(OSError):
                directory.clean(self.parent)
        seconds = time.perf_counter() - began
        self._outcome = Outcome(info.step, path, seconds if stall is None else stall, seconds, error)


def _places(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Place items of these sizes, in bytes, in blocks of up to _BLOCK_BYTES. A larger item gets a block for itself.

    Returns:
        (block, offset) of each item, and the size of each block.
    """
    places: list[tuple[int, int]] = []
    blocks: list[int] = []
    for size in sizes:
        needed = math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        if not blocks or blocks[-1] + needed > _BLOCK_BYTES:
            blocks.append(0)
        places.append((len(blocks) - 1, blocks[-1]))
        blocks[-1] += needed
    return places, blocks


def _failing(chunk: Chunk, error: Exception) -> Chunk:
    """Return a copy of the chunk, with a `load` that raises `error`."""

    def load() -> Tensor:
        raise error

    return replace(chunk, load=load)
