"""The section `checkpoint` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import not_negative, require


@dataclass
class CheckpointConfig:
    """Checkpoints, in the run directory's `checkpoints/step_N/`. A run in any sharding can resume from them."""

    save_every: int = 0
    """Number of steps between checkpoints; 0: save only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0: keep all."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this number; 0: keep no others."""
    asynchronous: bool = True
    """true: copy the state, and write the copy while training continues. false: training waits until the state is
    written, which takes less memory."""
    load: str | None = None
    """Directory of the checkpoint to resume from, or latest, or null. latest: the newest checkpoint of train.run_dir,
    or a new start if there is none; if the newest is damaged, the run says so and takes the one before it. null: a new
    start."""
    reset_optimizer: bool = False
    """Load weights, multipliers, step and position in the data, but start with fresh optimizer state."""

    def __post_init__(self) -> None:
        not_negative("checkpoint", save_every=self.save_every, keep=self.keep, keep_every=self.keep_every)
        require(
            self.load is None or bool(self.load.strip()),
            f"checkpoint.load is {self.load!r}: name a directory, or latest",
        )
        require(
            self.load is not None or not self.reset_optimizer,
            "checkpoint.reset_optimizer is true and checkpoint.load is not set: give a checkpoint",
        )
