"""An engine without DeepSpeed, and a run that it drives: what the processes of test_engine.py do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.config import CheckpointConfig
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.config import Config, ModelConfig
from megamult.data.config import DataConfig
from megamult.distributed.mesh import Mesh, current_mesh
from megamult.optim.clip import Norms
from megamult.optim.config import OptimizerConfig
from megamult.runtime.progress import Progress
from megamult.train.batches import MicroBatch, WeightedMicroBatch
from megamult.train.config import BatchRamp, TrainConfig
from megamult.train.engine import Engine, EngineState
from megamult.zero.gather import Logical
from tests.small import Samples, ValidSamples

VOCAB, SEQ, STEPS, ACCUMULATION, MICRO = 11, 8, 4, 3, 3
BATCHES = (3, 3, 6, 9)
"""Sequences in each step's batch; the last one is full: ACCUMULATION micro-batches."""
LR = 0.5


def tiny_model() -> torch.nn.Sequential:
    """A bigram model."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, 6), torch.nn.Linear(6, VOCAB))


def loss_of(model: torch.nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of a micro-batch."""
    return cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def samples() -> Samples:
    """Those for training."""
    return Samples(VOCAB, SEQ)


VALID = 2 * ACCUMULATION * MICRO


def valid_samples() -> ValidSamples:
    """Those for evaluations."""
    return ValidSamples(VALID, VOCAB, SEQ, offset=1000)


class PlainEngine:
    """One process, SGD. Its multipliers are the embedding's row sums: any tensor will do."""

    def __init__(self, events: list[str], mesh: Mesh) -> None:
        self.mesh = mesh
        self.model, self.events = tiny_model(), events
        self.parameter_count = sum(parameter.numel() for parameter in self.model.parameters())
        self.norms = Norms(math.nan, math.nan)
        self.skipped_steps = self.updates = 0
        self.factor = math.nan
        self.further_figures: dict[str, float] = {}

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"embedding": LR * self.factor}

    def set_lr_factor(self, factor: float) -> None:
        self.factor = factor

    @property
    def monitors(self) -> Mapping[str, Callable[[Mapping[str, float], int], None]]:
        return {}

    def train_batch(self, micro_batches: Iterator[MicroBatch], accumulation: int) -> Tensor:
        losses = []
        for tokens, labels in micro_batches:
            self.events.append("compute")
            losses.append(loss_of(self.model, tokens, labels))
            (losses[-1] / accumulation).backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.norms = Norms(float(torch.nn.utils.get_total_norm(g for g in gradients if g is not None)), 0.25)
        self.skipped_steps += self.updates == 1  # one of them, to be counted
        self.updates += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter.sub_(LR * self.factor * parameter.grad)
                parameter.grad = None
        return torch.stack(losses).mean().detach()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[WeightedMicroBatch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tokens, labels, weights in micro_batches:
            self.events.append("evaluate")
            for row, row_labels, weight in zip(tokens, labels, weights, strict=True):
                total += weight * loss_of(self.model, row[None], row_labels[None])
        return total

    def multipliers(self) -> Iterator[Logical]:
        yield Logical("x.row_multiplier", "multiplier", "embedding", "row", self.weights()["0.weight"].sum(1))

    def state(self) -> EngineState:
        chunks = [Chunk.whole(f"model.{name}", value) for name, value in self.weights().items()]
        return EngineState(chunks, self.updates, self.skipped_steps)

    def restore(self, checkpoint: SavedCheckpoint, *, reset_optimizer: bool) -> list[str]:
        checkpoint.load(self.state().chunks)
        return []

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


class Noting(Progress):
    """Notes where the run is among the engine's events."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def at(self, step: int, doing: str, grace: float = 0.0) -> None:
        self.events.append(f"{step}: {doing}")
        super().at(step, doing, grace)


def config_of(run_dir: Path) -> Config:
    """Steps with warm-up, of 1, 1, 2 and 3 micro-batches, an evaluation after every other one."""
    return Config(
        model=ModelConfig(seq_length=SEQ),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=2),
        data=DataConfig(valid="made up"),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=ACCUMULATION * MICRO,
            micro_batch_size=MICRO,
            batch_ramp=BatchRamp(start=MICRO, increment=MICRO, samples=12),
            run_dir=str(run_dir),
            eval_every=2,
            eval_batches=2,
        ),
        checkpoint=CheckpointConfig(save_every=3, keep=0),
    )


def drive(folder: Path) -> dict[str, Any]:
    """A run from its first step to its last, and the end of it once more from the checkpoint of step 3."""
    from megamult.distributed import start
    from megamult.runtime.signals import StopRequests
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.loop import Trainer

    start.initialize(1)
    config = config_of(folder / "run")
    found: dict[str, Any] = {}
    for what in ("whole", "rest"):
        events: list[str] = []
        plain = PlainEngine(events, current_mesh())
        engine: Engine = plain
        trainer = Trainer(config, engine, samples(), {"": valid_samples()}, VOCAB, Noting(events))
        if what == "rest":
            checkpoint = SavedCheckpoint(folder / "whole/checkpoints/step_3")
            engine.restore(checkpoint, reset_optimizer=False)
            trainer.resume(checkpoint.info)
            found["optimizer"] = checkpoint.info.optimizer
        with StopRequests() as stop:
            reason = trainer.run(folder / what, RunCheckpoints(folder / what, config, VOCAB, trainer.engine.mesh), stop)
        weights = {name: value.clone() for name, value in plain.weights().items()}
        found[what] = {"reason": reason, "events": events, "weights": weights, "multipliers": trainer.last_multipliers}
    return found
