"""Runs that are asked to stop, and saves that overlap or fail, on this launch's processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megamult.distributed.mesh import current_mesh
from tests.invariance import Case
from tests.small import VOCAB, Samples, ValidSamples


class Signalling(Samples):
    """Sends this process a signal when the step that begins with sample `at` begins."""

    def __init__(self, at: int, number: signal.Signals, vocab_size: int, seq_length: int) -> None:
        super().__init__(vocab_size, seq_length, skewed=True)
        self.at, self.number = at, number

    def prepare(self, first: int, last: int, barrier: Callable[[], None], end: int) -> None:
        """Samples themselves are read before their step begins."""
        if first == self.at:
            os.kill(os.getpid(), self.number)


class SignallingValid(ValidSamples):
    """Sends this process a signal when an evaluation begins."""

    def __init__(self, number: signal.Signals | None, seq_length: int) -> None:
        super().__init__(12, VOCAB, seq_length)
        self.number = number

    def prepare(self, barrier: Callable[[], None]) -> None:  # type: ignore[override]
        """Samples themselves are read afterwards."""
        if self.number is not None:
            os.kill(os.getpid(), self.number)


def stopped_runs(folder: Path) -> list[tuple[str | None, int, list[str]]]:
    """(reason, steps done, checkpoints) of runs over 6 steps: a signal to the second rank in step 3, with and without
    checkpoints in between, and where it is the second of a tensor-parallel group; a deadline that is past; none of
    these; a signal during the evaluation after step 2."""
    from megamult.distributed import start
    from megamult.runtime.signals import StopRequests
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer

    found = []
    third = 2 * Case().config().train.global_batch_size  # the first sample of step 3
    cases = [
        (1, third, signal.SIGTERM, None, 0),
        (1, third, signal.SIGUSR1, None, 2),
        (2, third, signal.SIGUSR1, None, 0),
        (1, -1, None, time.monotonic(), 0),
        (1, -1, None, None, 4),
        (1, "evaluation", signal.SIGUSR1, None, 0),
    ]
    for i, (tensor, at, number, deadline, save_every) in enumerate(cases):
        config = Case(world=2, tensor=tensor, zero=1, steps=6).config()
        config.checkpoint.save_every, config.checkpoint.keep = save_every, 0
        engine = build(config, VOCAB, start.initialize(tensor))
        second = torch.distributed.get_rank() == 1  # only this one is signalled
        valid = None
        if at == "evaluation":
            config.train.eval_every, config.train.eval_batches = 2, 1
            valid = {"": SignallingValid(number if second else None, config.model.seq_length)}
        at = at if second and at != "evaluation" else -1
        samples = Signalling(at, number or signal.SIGTERM, VOCAB, config.model.seq_length)
        trainer = Trainer(config, engine, samples, valid, VOCAB)
        run_dir = folder / str(i)
        with StopRequests(deadline) as stop:
            reason = trainer.run(run_dir, RunCheckpoints(run_dir, config, VOCAB, trainer.engine.mesh), stop)
        engine.deepspeed.destroy()
        torch.distributed.barrier()
        found.append((reason, trainer.step_count, sorted(path.name for path in (run_dir / "checkpoints").iterdir())))
    return found


def overlapping_saves(folder: Path) -> dict[str, Any]:
    """Two saves at once, then one that the second rank cannot write, then a good one."""
    from megamult.checkpoint import saver as saver_module
    from megamult.checkpoint.chunks import Chunk
    from megamult.checkpoint.info import CheckpointInfo
    from megamult.checkpoint.saver import Saver
    from megamult.distributed import start

    start.initialize(1)
    rank = torch.distributed.get_rank()
    release, order, clock = threading.Event(), list[str](), [0.0]
    saver = Saver(folder, current_mesh())
    state = torch.full((4,), 1.0)

    def chunks(load: Any = None) -> list[Chunk]:
        return [Chunk("model.x", (8,), (4 * rank,), (4,), load or (lambda: state))]

    def info(step: int) -> CheckpointInfo:
        return CheckpointInfo(step, 0, {}, 1)

    found: dict[str, Any] = {"order": order}
    write = saver._write

    def slowly(*args: Any) -> None:
        release.wait()
        write(*args)
        order.append(f"step {args[1].step} is written")

    saver._write = slowly  # type: ignore[method-assign]
    assert saver.save(chunks(), info(1), {}) is None
    state.fill_(2.0)  # training goes on
    found["still writing"] = saver.poll()
    assert saver._thread is not None
    join = saver._thread.join

    def waiting(seconds: float | None = None) -> None:
        order.append("the second save waits")
        clock[0] += 100.0
        release.set()
        join(seconds)

    saver._thread.join = waiting  # type: ignore[method-assign]
    with mock.patch.object(saver_module, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        found["first"] = saver.save(chunks(), info(2), {})
        order.append("the second save is begun")
        release.set()
        found["second"] = saver.wait()
    saver._write = write  # type: ignore[method-assign]

    def fail() -> Tensor:
        raise OSError(28, "No space left on device")

    saver.asynchronous = False
    found["failed"] = saver.save(chunks(fail if rank == 1 else None), info(3), {})
    found["after"] = saver.save(chunks(), info(4), {})
    torch.distributed.barrier()
    found["left"] = sorted(path.name for path in folder.iterdir())
    return found


def found_checkpoints(folder: Path) -> list[str]:
    """What `find` chooses, or says: the newest damaged in its description; a rank that the run does not fit; a
    checkpoint that a crash left half replaced; a damaged one before its tensors are looked at."""
    from megamult.checkpoint import directory, resume, saved
    from megamult.checkpoint.chunks import Chunk
    from megamult.checkpoint.info import INFO, CheckpointInfo
    from megamult.distributed import start

    start.initialize(1)
    rank, parent = torch.distributed.get_rank(), folder / "checkpoints"
    if rank == 0:
        for step in (1, 2):
            path = directory.of_step(parent, step)
            saved.write(path, [Chunk.whole("model.x", torch.ones(3))], CheckpointInfo(step, 0, {}, 10), {})
        directory.point(parent, directory.of_step(parent, 2))

    def find(fits: Any = lambda checkpoint: None, values_fit: Any = lambda checkpoint: None) -> str:
        torch.distributed.barrier()
        try:
            checkpoint = resume.find(current_mesh(), "latest", folder, fits, "load", values_fit)
            return "none" if checkpoint is None else checkpoint.path.name
        except ValueError as error:
            return str(error)

    def refuse(checkpoint: saved.SavedCheckpoint) -> None:
        if rank == 1:
            raise ValueError("it does not fit rank 1")

    answers = [find(), find(refuse)]
    if rank == 0:
        (parent / "step_2").rename(parent / "step_2.old.tmp")
    answers.append(find())
    if rank == 0:
        description = (parent / "step_2" / INFO).read_text()
        (parent / "step_2" / INFO).write_text(description.replace('"vocab_size": 10', '"vocab_size": 11'))

    def fits_ten(checkpoint: saved.SavedCheckpoint) -> None:
        if checkpoint.info.vocab_size != 10:
            raise ValueError(f"vocab_size {checkpoint.info.vocab_size} does not fit")

    answers.append(find(fits_ten))
    if rank == 0:
        (parent / "step_2" / INFO).write_text(description)
        shard = next((parent / "step_2").glob("shard_*"))
        shard.write_bytes(shard.read_bytes()[:-1])

    def all_ones(checkpoint: saved.SavedCheckpoint) -> None:
        if not bool((checkpoint.read("model.x") == 1).all()):
            raise ValueError(f"{checkpoint.path.name} has other values")

    def none_fits(checkpoint: saved.SavedCheckpoint) -> None:
        raise ValueError(f"the values of {checkpoint.path.name} do not fit")

    return [*answers, find(values_fit=all_ones), find(values_fit=none_fits)]
