"""Evaluation of a run's validation sets: each sample counts once, whatever the batch and the number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device
from megamult.runtime.patience import ON_FILES
from megamult.runtime.progress import Progress
from megamult.train.batches import MicroBatches, Readable, WeightedMicroBatch
from megamult.train.engine import Engine
from megamult.train.votes import sums_and_votes


class EvaluationSamples(Readable, Protocol):
    """Samples of a validation set (:class:`megamult.data.validation_set.ValidationSet`). Their indices begin with 0.

    Indices from the length on are allowed, and have the weight 0."""

    def __len__(self) -> int: ...

    def weight(self, index: int) -> float:
        """Return the weight of a sample in the set's loss. The weights of all samples sum to 1."""

    def prepare(self, barrier: Callable[[], None]) -> None:
        """Make all samples ready. Collective over all ranks."""


class Evaluation:
    """Evaluations of an engine on validation sets. Every rank calls every method together.

    Every rank takes the same number of micro-batches of a set: the last of them, or all those of a rank for which no
    sample is left, are filled with samples of weight 0.

    Args:
        config: configuration of the run.
        engine: the engine.
        sets: validation sets by name; "" is the name of one without a name.
        progress: progress of this rank.
    """

    def __init__(
        self, config: Config, engine: Engine, sets: Mapping[str, EvaluationSamples], progress: Progress
    ) -> None:
        self._config, self._engine, self._sets, self._progress = config, engine, sets, progress

    def __bool__(self) -> bool:
        """Whether there is a validation set."""
        return bool(self._sets)

    def losses(self, step: int, votes: Callable[[], Sequence[float]] = tuple) -> tuple[dict[str, float], list[float]]:
        """Evaluate all sets, after `step` steps.

        Args:
            votes: function that returns this rank's votes on stopping, called at the end.

        Returns:
            (mean cross entropy of each set in nats per token by its name, sums of the votes over all ranks).
        """
        sums = torch.stack([self._sum(name, samples, step) for name, samples in self._sets.items()])
        totals, voted = sums_and_votes(self._engine.mesh, sums, votes())
        return dict(zip(self._sets, totals, strict=True)), voted

    def _sum(self, name: str, samples: EvaluationSamples, step: int) -> Tensor:
        """Return this data-parallel rank's part of a set's loss."""
        mesh, size = self._engine.mesh, self._config.train.micro_batch_size
        data_rank, data_size = mesh.coordinates.on("data")
        what = f"evaluation of {name}" if name else "evaluation"
        self._progress.at(step, f"samples of the {what}", ON_FILES)
        samples.prepare(mesh.barrier)
        rounds = -(-len(samples) // (size * data_size))
        starts = list(range(data_rank * size, rounds * data_size * size, data_size * size))

        def taken(batches: MicroBatches) -> Iterator[WeightedMicroBatch]:
            for number, start in enumerate(starts, 1):
                which = f"{what}'s micro-batch {number} of {rounds}"
                self._progress.at(step, f"reading the {which}", ON_FILES)
                tokens, labels = batches.take()
                self._progress.at(step, which)
                weights = [samples.weight(index) for index in range(start, start + size)]
                yield tokens, labels, device.upload(torch.tensor(weights, dtype=torch.float64))

        seq_length = self._config.model.seq_length
        with contextlib.closing(MicroBatches(samples, iter(starts), size, seq_length, mesh)) as batches:
            batches.allow(rounds * data_size * size)
            return self._engine.evaluate(taken(batches))


def record_of(losses: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of an evaluation: `valid_loss`, the mean of the sets' losses, and `valid/NAME/loss` of each
    set that has a name."""
    named = {f"valid/{name}/loss": loss for name, loss in losses.items() if name}
    return {"valid_loss": sum(losses.values()) / len(losses), **named}
