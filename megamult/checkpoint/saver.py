"""Saves while training goes on: state is copied aside, a thread of every rank writes it.

A save is collective: every rank calls it at the same step. Ranks talk about it over CPUs, in a group of its own, so
that nothing of it meets the training's collectives.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megamult import device
from megamult.checkpoint import directory, saved
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo

_ALIGNMENT = 64
_GROUP_TIMEOUT = datetime.timedelta(hours=2)
"""How long the fastest rank's file system may wait for the slowest's."""


@dataclass(frozen=True)
class Outcome:
    """Of one save."""

    path: Path
    stall_seconds: float
    """For which training stood still."""
    seconds: float
    """From the call to the moment when `latest` named it."""
    error: str | None
    """None: it is complete."""


class Saver:
    """Writes a run's checkpoints into `parent`.

    Args:
        parent: the run's `checkpoints` directory, on a file system that all ranks see.
        keep, keep_every: as :func:`megamult.checkpoint.directory.retain`.
        asynchronous: copy the state aside (as much CPU memory as this rank's share of it takes) and write it while
            training goes on; False: write it in `save`.
    """

    def __init__(self, parent: Path, *, keep: int = 0, keep_every: int = 0, asynchronous: bool = True) -> None:
        self.parent, self.keep, self.keep_every, self.asynchronous = parent, keep, keep_every, asynchronous
        self.group = torch.distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        self._first = torch.distributed.get_rank() == 0
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    def save(self, chunks: Sequence[Chunk], info: CheckpointInfo, files: Mapping[str, bytes]) -> Outcome | None:
        """Begin a save; one that is still being written is finished first.

        Args:
            chunks: this rank's share of the state (:func:`megamult.checkpoint.state.owned`).
            info, files: what goes beside it; the first rank's count.

        Returns:
            What became of the save before, if that is not known yet; of this one, if not asynchronous.
        """
        began = time.perf_counter()
        before = self.wait()
        if self.asynchronous:
            chunks = self._stage(chunks)
            stall = time.perf_counter() - began
            self._thread = threading.Thread(
                target=self._write, args=(chunks, info, files, began, stall), name="checkpoint", daemon=True
            )
            self._thread.start()
            return before
        self._write(chunks, info, files, began, None)
        return self.poll()

    def poll(self) -> Outcome | None:
        """What became of a save that has ended since the last question."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread, outcome, self._outcome = None, self._outcome, None
        return outcome

    def wait(self) -> Outcome | None:
        """Let a save that is being written end; what became of it."""
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def _stage(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Copy values aside, into memory that is used again for the next save."""
        places, end = [], 0
        for chunk in chunks:
            places.append(end)
            end += math.ceil(chunk.nbytes / _ALIGNMENT) * _ALIGNMENT
        if self._buffer.numel() != end:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first let go of the old one
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.has_cuda())
        staged = []
        for chunk, place in zip(chunks, places, strict=True):
            copy = self._buffer[place : place + chunk.nbytes].view(chunk.dtype).view(chunk.sizes)
            copy.copy_(chunk.load(), non_blocking=True)
            staged.append(replace(chunk, load=_give(copy)))
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
            directory.retain(self.parent, info.step, self.keep, self.keep_every)

        try:
            saved.write(path, chunks, info, files, group=self.group, complete=complete)
        except Exception as cause:  # whatever it is: training need not end because of it
            error = str(cause) or type(cause).__name__
        if error is not None and self._first:
            with contextlib.suppress(OSError):
                directory.clean(self.parent)
        seconds = time.perf_counter() - began
        self._outcome = Outcome(path, seconds if stall is None else stall, seconds, error)


def _give(values: Tensor) -> Callable[[], Tensor]:
    return lambda: values
