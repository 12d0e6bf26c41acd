"""The section `checkpoint` of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import not_negative, require


@dataclass
class CheckpointConfig:
    """Checkpoints, in the run directory's `checkpoints/step_N/`. A run in any sharding can resume from them."""

    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this; 0: none."""
    asynchronous: bool = True
    """true: copy the state and write it while training continues; false: write it at once, which takes less memory."""
    load: str | None = None
    """Checkpoint to resume from: its directory, or latest: the newest one of train.run_dir, if there is one (if it is
    damaged, the run says so and takes the one before it). null: start anew."""
    reset_optimizer: bool = False
    """Load weights, multipliers and position from the checkpoint, and start with fresh optimizer state."""

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
