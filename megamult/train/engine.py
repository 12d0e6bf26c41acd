"""The interface between the training loop and an engine: a model and its optimizer, spread over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.distributed.mesh import Mesh
from megamult.optim.clip import Norms
from megamult.train.batches import MicroBatch
from megamult.zero.gather import Logical


@dataclass(frozen=True)
class EngineState:
    """State of an engine in a checkpoint."""

    chunks: list[Chunk]
    """This rank's share of weights, multipliers and optimizer state; over all ranks, each element once."""
    updates: int
    """Number of optimizer steps that were applied."""
    skipped_steps: int


class Engine(Protocol):
    """A model and its optimizer, which take steps. Every rank calls every method together, with its own micro-batches.

    Micro-batches come as an iterator. An engine takes each only when it is about to compute it, because taking one
    reads files, and tells the watchdog how far the run is.
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
        """Number of steps so far that changed nothing, because the gradient was not finite or too large."""

    def set_lr_factor(self, factor: float) -> None:
        """Set the learning rates of the next steps to `factor` times their peaks."""

    def train_batch(self, micro_batches: Iterator[MicroBatch]) -> Tensor:
        """Take one optimizer step on all micro-batches.

        Returns:
            The cross entropy in nats, mean over this data-parallel rank's micro-batches: an fp32 scalar on the device.
        """

    def evaluate(self, micro_batches: Iterator[MicroBatch]) -> Tensor:
        """Compute the cross entropy as :meth:`train_batch` does, and change nothing."""

    def multipliers(self) -> Iterable[Logical]:
        """Yield all multipliers, each complete on global rank 0."""

    def state(self) -> EngineState:
        """Return the state to save; its chunks are views of live memory."""

    def restore(self, checkpoint: SavedCheckpoint, *, reset_optimizer: bool) -> list[str]:
        """Replace the engine's state by a checkpoint's, before the first step.

        Args:
            checkpoint: a checkpoint of the same model.
            reset_optimizer: whether to leave the optimizer's state as it is.

        Returns:
            Names of multipliers that the checkpoint does not have: they start at 1, where they change nothing.

        Raises:
            ValueError: a tensor is missing in the checkpoint or has another shape, or a weight is NaN afterwards.
        """
