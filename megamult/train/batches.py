"""Micro-batches for the training loop, read ahead by a thread on one rank of each tensor-parallel group."""

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
"""(tokens, labels): token ids, each tensor [micro-batch, seq], on this process's device."""

WeightedMicroBatch = tuple[Tensor, Tensor, Tensor]
"""(tokens, labels, weights): a micro-batch and, [micro-batch] in float64, the weight of each of its samples."""

_AHEAD = 4
"""Number of micro-batches to read ahead: enough to hide one slow read."""


class Readable(Protocol):
    """Samples that a second thread may read while the main thread trains."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample `index`: the tensors `tokens` and `labels`, each [seq]."""


class Samples(Readable, Protocol):
    """The samples of a run. Sample i depends on i only, not on the sharding (:class:`megamult.data.BlendedDataset`)."""

    def prepare(self, first: int, last: int, barrier: Callable[[], None], end: int) -> None:
        """Make samples [first, last) ready before returning, and begin to prepare those up to `end` in the background.

        Collective over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the samples that a checkpoint must contain."""

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """Continue the run that saved `state`, with the sample of index `samples` as the next one. Return lines about
        the data sources for the user to read."""


class MicroBatches:
    """Micro-batches of this data-parallel rank in order, each of consecutive samples.

    Tensor-parallel ranks train on the same tokens. The first rank of each tensor-parallel group reads them. When
    the group takes a micro-batch, its first rank sends the tokens to its other ranks. All ranks call each method
    together. The micro-batches depend on `starts` only, and not on when they are read.

    Args:
        samples: the samples to read.
        starts: index of the first sample of each micro-batch.
        size: number of samples in a micro-batch.
        seq_length: number of tokens in a sample.
        mesh: mesh of the processes.
    """

    def __init__(self, samples: Readable, starts: Iterator[int], size: int, seq_length: int, mesh: Mesh) -> None:
        self._samples, self._starts, self._size = samples, starts, size
        self._shape = (2, size, seq_length)
        self._end = 0
        self._mesh = mesh
        self._next: int | None = None  # first element of `starts` that has not been given to the thread
        self._waiting = 0  # number of micro-batches that were given to the thread and not taken yet
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if mesh.rank_on("tensor") == 0:
            self._thread = threading.Thread(target=self._work, name="samples", daemon=True)
            self._thread.start()

    def allow(self, end: int) -> None:
        """Allow the thread to read the samples before index `end`. Without this call it reads none at all."""
        self._end = end
        self._ask()

    def take(self) -> MicroBatch:
        """Return the next micro-batch.

        Raises:
            Exception: reading this micro-batch failed. Only the rank that reads raises it. The other ranks of the
                tensor-parallel group wait for the tokens, and end when that rank ends.
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
        """End the thread after its current read, and discard the micro-batches that were read ahead."""
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
"""Seconds that `close` waits for the thread to end. A file server may never answer the thread's current read."""
