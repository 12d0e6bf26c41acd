"""Interface between the training loop and an engine, which is a model with its optimizer, spread over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.distributed.mesh import Mesh
from megamult.optim.clip import Norms
from megamult.train.batches import MicroBatch, WeightedMicroBatch
from megamult.zero.gather import Logical


@dataclass(frozen=True)
class EngineState:
    """State of an engine in a checkpoint."""

    chunks: list[Chunk]
    """This rank's share of weights, multipliers and optimizer state. Each element is in exactly one rank's share."""
    updates: int
    """Number of optimizer steps that were applied."""
    skipped_steps: int
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Choices of the update rules by kind of parameter, see :attr:`megamult.optim.rule.UpdateRule.choices`."""


class Engine(Protocol):
    """Model with its optimizer. Every rank calls every method together, with its own micro-batches.

    Micro-batches come as an iterator. An engine takes a micro-batch from it only when it is about to compute on that
    micro-batch, because taking one reads files and tells the watchdog how far the run is.
    """

    @property
    def mesh(self) -> Mesh:
        """Mesh of the processes that the engine computes on."""

    @property
    def parameter_count(self) -> int:
        """Number of logical parameters (without padding) of the whole model."""

    @property
    def norms(self) -> Norms:
        """Norms of the last step's gradient, over all ranks."""

    @property
    def skipped_steps(self) -> int:
        """Number of steps so far that changed nothing, because the gradient was not finite or was too large."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step by param group, and of each role that has factors of its own."""

    @property
    def further_figures(self) -> dict[str, float]:
        """Figures of the last step that only some configurations have, such as those of QK-clip, by name. They are the
        same on every rank."""

    def set_lr_factor(self, factor: float) -> None:
        """Set all learning rates to `factor` times their peaks, from the next step on.

        Those of multipliers stay at their peaks if `multipliers.schedule` is `constant`.
        """

    @property
    def monitors(self) -> Mapping[str, Callable[[Mapping[str, float], int], None]]:
        """The engine's own monitors, by name: functions of figures {name: value} and the number of sequences that the
        run has trained on. There are some on global rank 0 only."""

    def train_batch(self, micro_batches: Iterator[MicroBatch], accumulation: int) -> Tensor:
        """Take one optimizer step by the mean gradient of all micro-batches.

        Args:
            micro_batches: this rank's micro-batches.
            accumulation: number of micro-batches, the same on every rank. It may differ from step to step.

        Returns:
            The mean cross entropy in nats over this data-parallel rank's micro-batches, an fp32 scalar on the device.
        """

    def evaluate(self, micro_batches: Iterator[WeightedMicroBatch]) -> Tensor:
        """Compute a weighted sum of the cross entropies of samples, and change neither model nor optimizer.

        Args:
            micro_batches: this rank's micro-batches, the same number on every rank.

        Returns:
            The sum over all samples of weight x mean cross entropy of the sample's tokens, in nats, a float64 scalar on
            the device. Samples of weight 0 do not count, whatever their cross entropy."""

    def multipliers(self) -> Iterable[Logical]:
        """Yield all multipliers. Their values are complete on global rank 0 only. All ranks iterate together."""

    def state(self) -> EngineState:
        """Return the state to save. Its chunks are views of live memory: copy or write them before the next step."""

    def restore(self, checkpoint: SavedCheckpoint, *, reset_optimizer: bool) -> None:
        """Replace the engine's state by a checkpoint's, before the first step.

        Args:
            checkpoint: a checkpoint of the same model.
            reset_optimizer: whether to start with fresh optimizer state instead of the checkpoint's.

        Raises:
            ValueError: a tensor is missing in the checkpoint or has another shape, or a weight is NaN afterwards.
        """
