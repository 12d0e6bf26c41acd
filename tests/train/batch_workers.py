"""Micro-batches as the ranks of a launch take them."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import torch
from torch import Tensor

from megamult.distributed.mesh import current_mesh

SEQ, SIZE = 4, 2


class Recorded:
    """Sample i holds i; remembers what was read, and by which thread."""

    def __init__(self, bad: int = -1) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.bad = bad

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.bad:
            raise ValueError(f"sample {index} is bad")
        return {"tokens": torch.full((SEQ,), index), "labels": torch.full((SEQ,), -index)}


def settle(batches: Any, samples: Recorded) -> list[int]:
    """What has been read, once everything is that was asked for."""
    while batches._thread is not None and batches._read.qsize() < batches._waiting:
        time.sleep(0.01)
    return list(samples.read)


def taken(tensor: int) -> tuple[list[list[int]], list[int], set[str]]:
    """(first column of tokens and labels of six micro-batches, what was read, by which threads)."""
    from megamult.distributed import start
    from megamult.distributed.mesh import current_mesh
    from megamult.train.batches import MicroBatches

    start.initialize(tensor)
    samples, data = Recorded(), current_mesh().groups["data"]
    starts = itertools.count(data.rank() * SIZE, data.size() * SIZE)
    batches = MicroBatches(samples, starts, SIZE, SEQ, current_mesh())
    found = []
    for number in range(6):
        batches.allow(data.size() * SIZE * min(number + 2, 6))  # the next one too, and none beyond the last
        tokens, labels = batches.take()
        assert tokens.shape == labels.shape == (SIZE, SEQ)
        found.append([*tokens[:, 0].tolist(), *labels[:, -1].tolist()])
    read = settle(batches, samples)
    batches.close()
    # Data-parallel ranks exchange nothing here: rank 0 must not end while others still read its store.
    current_mesh().barrier()
    return found, read, samples.threads


def ahead() -> tuple[list[int], list[int], list[str]]:
    """What is read before the first micro-batch is taken, and after; what a bad sample raises, and where."""
    from megamult.distributed import start
    from megamult.train.batches import MicroBatches

    start.initialize(1)
    samples = Recorded(bad=5)
    batches = MicroBatches(samples, itertools.count(0, SIZE), SIZE, SEQ, current_mesh())
    batches.allow(100)
    before = settle(batches, samples)
    raised = []
    for _ in range(4):
        try:
            raised.append(str(int(batches.take()[0][0, 0])))
        except ValueError as error:
            raised.append(str(error))
    after = settle(batches, samples)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "samples"]
    return before, after, raised
