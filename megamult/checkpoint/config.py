"""The section `checkpoint` of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import not_negative, require


@dataclass
class CheckpointConfig:
    """Checkpoints, in the run directory's `checkpoints/step_N/`; any layout of processes can resume from them."""

    save_every: int = 0
    """Steps between checkpoints; 0: at the end alone."""
    keep: int = 2
    """How many of the newest to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept besides; 0: none."""
    asynchronous: bool = True
    """true: copy the state aside and write it while training goes on; false: write it at once, in less memory."""
    load: str | None = None
    """Where to go on from: a checkpoint's directory; or latest: the newest one of train.run_dir, if there is any (one
    that is damaged is reported, and the one before it taken). null: start anew."""
    reset_optimizer: bool = False
    """Take weights, multipliers and position from the checkpoint, and leave the optimizer's state."""

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
