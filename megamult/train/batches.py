"""Micro-batches for the training loop: a thread reads them ahead, on one rank of each tensor-parallel group."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh

MicroBatch = tuple[Tensor, Tensor]
"""Tokens and labels, ids [micro batch, seq] each, on this process's device."""

_AHEAD = 4
"""Micro-batches that are read before they are asked for: enough that one slow read is not felt."""


class Readable(Protocol):
    """Samples that a thread may read."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens` and `labels`, [seq] each."""


class Samples(Readable, Protocol):
    """The samples of a run. Sample i depends on i only, not on the sharding (:class:`megamult.data.BlendedDataset`)."""

    def prepare(self, first: int, last: int, barrier: Callable[[], None], end: int) -> None:
        """Make samples [first, last) ready, and the run's others, before `end`, in time; all ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of them."""

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """Go on before global sample `samples` of a run that left `state`; return lines that a user should read."""


class MicroBatches:
    """The micro-batches of this data-parallel rank, one after the other, each of consecutive samples.

    Tensor-parallel ranks train on the same tokens: the first of them reads, and sends each micro-batch to the others
    over their group when it is taken. Every rank calls every method together. Nothing is computed from when a read
    happens: what comes is a function of `starts` only.

    Args:
        samples: what is read.
        starts: first sample of each micro-batch.
        size: samples of a micro-batch.
        seq_length: tokens of a sample.
        mesh: of the processes.
    """

    def __init__(self, samples: Readable, starts: Iterator[int], size: int, seq_length: int, mesh: Mesh) -> None:
        self._samples, self._starts, self._size = samples, starts, size
        self._shape = (2, size, seq_length)
        self._end = 0
        self._mesh = mesh
        self._next: int | None = None  # the first start that has not been given to the thread
        self._waiting = 0  # given to it, and not taken yet
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if mesh.rank_on("tensor") == 0:
            self._thread = threading.Thread(target=self._work, name="samples", daemon=True)
            self._thread.start()

    def allow(self, end: int) -> None:
        """Let samples before `end` be read from now on; none has been read at or after an earlier `end`."""
        self._end = end
        self._ask()

    def take(self) -> MicroBatch:
        """Return the next micro-batch.

        Raises:
            Exception: what reading this micro-batch raised, on the rank that reads. Its tensor-parallel peers wait for
                the tokens until that rank's end ends them.
        """
        if self._thread is None:
            both = torch.empty(self._shape, dtype=torch.int64, device=device.local_device())
        else:
            assert self._waiting, "the micro-batch begins at or after the allowed end"
            found = self._read.get()
            self._waiting -= 1
            self._ask()
            if isinstance(found, BaseException):
                raise found
            both = device.upload(found)
        self._mesh.send_from_first(both, "tensor")
        return both[0], both[1]

    def close(self) -> None:
        """End the thread after the read that it is in; what has been read ahead is dropped."""
        if self._thread is not None:
            while not self._asked.empty():
                self._asked.get()
            self._asked.put(None)
            self._thread.join(_CLOSE_SECONDS)

    def _ask(self) -> None:
        while self._thread is not None and self._waiting < _AHEAD:
            if self._next is None:
                self._next = next(self._starts, None)
            if self._next is None or self._next + self._size > self._end:
                return
            self._asked.put(self._next)
            self._next = None
            self._waiting += 1

    def _work(self) -> None:
        while (start := self._asked.get()) is not None:
            try:
                rows = [self._samples[i] for i in range(start, start + self._size)]
                found: Any = torch.stack([torch.stack([row[key] for row in rows]) for key in ("tokens", "labels")])
            except BaseException as error:
                found = error
            self._read.put(found)


_CLOSE_SECONDS = 5.0
"""Seconds that `close` waits: the thread may be in a read that a file server does not answer."""
