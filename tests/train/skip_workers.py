"""A run that leaves out samples, and restarts of it, with an engine that only notes what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megamult.checkpoint import resume
from megamult.checkpoint.config import CheckpointConfig
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.config import Config, ModelConfig
from megamult.data.config import DataConfig
from megamult.data.dataset import BlendedDataset
from megamult.data.skip import Skip
from megamult.distributed.mesh import current_mesh
from megamult.optim.clip import Norms
from megamult.train.batches import MicroBatch
from megamult.train.config import TrainConfig
from tests.data.conftest import SEQ, StubTokenizer
from tests.train.plain_engine import VOCAB, PlainEngine

BATCH, STEPS = 16, 20
Windows = list[list[int]]


class NotingEngine(PlainEngine):
    """Trains on nothing, and notes the tokens of every sample."""

    def __init__(self) -> None:
        super().__init__([], current_mesh())
        self.seen: Windows = []
        self.norms = Norms(1.0, 1.0)

    def train_batch(self, micro_batches: Iterator[MicroBatch], accumulation: int) -> Tensor:
        for tokens, _ in micro_batches:
            self.seen += tokens.tolist()
        return torch.zeros(())


def runs(prefix: str, folder: Path, starts: Sequence[tuple[str, int, list[list[int]]]]) -> list[Windows | str]:
    """What each start of a run has seen, or why it was refused.

    Args:
        starts: (name of the run whose checkpoint it goes on from or "", its step, data.skip), in turn; starts are named
            by their numbers.
    """
    from megamult.distributed import start
    from megamult.runtime.signals import StopRequests
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.loop import Trainer

    start.initialize(1)
    found: list[Windows | str] = []
    for number, (load, step, skip) in enumerate(starts):
        config = Config(
            model=ModelConfig(seq_length=SEQ),
            data=DataConfig(skip=skip),
            train=TrainConfig(steps=STEPS, global_batch_size=BATCH, micro_batch_size=4),
            checkpoint=CheckpointConfig(save_every=1, keep=0),
        )
        samples = BlendedDataset(
            [(prefix, 1.0)], StubTokenizer(), SEQ, config.train.seed, folder / "cache", Skip.of(skip)
        )
        engine = NotingEngine()
        trainer = Trainer(config, engine, samples, None, VOCAB)
        if load:
            info = SavedCheckpoint(folder / load / "checkpoints" / f"step_{step}").info
            try:
                resume.check_fits(info, config, VOCAB, None)
            except ValueError as error:
                found.append(str(error))
                continue
            trainer.resume(info)
        run_dir = folder / str(number)
        with StopRequests() as stop:
            trainer.run(run_dir, RunCheckpoints(run_dir, config, VOCAB, current_mesh()), stop)
        samples.close()
        found.append(engine.seen)
    return found
