"""The section `checkpoint` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import not_negative, require


@dataclass
class CheckpointConfig:
    """Saving of checkpoints in the run directory's `checkpoints/step_N/`, and resuming from them in any sharding."""

    save_every: int = 0
    """Number of steps between checkpoints; 0: save only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0: keep all."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this number; 0: keep only the newest."""
    asynchronous: bool = True
    """true: copy the state, and write the copy while training continues. false: write the state itself while training
    waits. This needs no memory for the copy."""
    load: str | None = None
    """Directory of the checkpoint to resume from, or `latest`, or null. With `latest`, the run resumes from the newest
    checkpoint of train.run_dir, or starts anew if there is none. If the newest is damaged, the run says so and takes
    the one before it. null: start anew."""
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
