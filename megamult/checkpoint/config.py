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
    start: str | None = None
    """Directory of a checkpoint, such as an imported model, from which a run without a checkpoint of its own starts. It
    is read if `load` is null, and if `load` is `latest` and train.run_dir has no checkpoint."""
    reset_optimizer: bool = False
    """Load weights, multipliers, step and position in the data, but start with fresh optimizer state."""

    def __post_init__(self) -> None:
        not_negative("checkpoint", save_every=self.save_every, keep=self.keep, keep_every=self.keep_every)
        require(
            self.load is None or bool(self.load.strip()),
            f"checkpoint.load is {self.load!r}: name a directory, or latest",
        )
        require(
            self.start is None or bool(self.start.strip()),
            f"checkpoint.start is {self.start!r}: name the directory of a checkpoint",
        )
        require(
            self.start is None or self.load in (None, "latest"),
            f"checkpoint.start is {self.start!r} and checkpoint.load is {self.load!r}: the run resumes from load, and "
            "start has no effect; leave one of them out",
        )
        require(
            (self.load or self.start) is not None or not self.reset_optimizer,
            "checkpoint.reset_optimizer is true, and neither checkpoint.load nor checkpoint.start is set: give a "
            "checkpoint",
        )
