"""Weights & Biases as a further output of a run's figures, beside metrics.jsonl and TensorBoard.

The package `wandb` is imported only where a run uses it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamult.monitor.config import WandbConfig

_ID = "wandb_id"
"""File in the run directory with the id of the run at Weights & Biases."""
_STEP = "step"


def check(settings: WandbConfig) -> None:
    """Check that the package is there, if the settings need it.

    Raises:
        ValueError: it is not installed.
    """
    if settings.project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"monitor.wandb.project is {settings.project!r} and the package wandb is not installed: pip install "
            "'megamult[wandb]', or leave monitor.wandb out"
        )


class WeightsAndBiases:
    """One run at Weights & Biases. Only global rank 0 makes this object.

    A later start of the same run directory goes on with the same run there, which is found by an id in the file
    `wandb_id`. Offline, each start writes a folder of its own with that id under `run_dir`/wandb, and `wandb sync`
    joins them. Figures are over the optimizer step: where a start repeats steps after a crash, they are there twice.

    Args:
        settings: the section `monitor.wandb`, with a project.
        run_dir: directory of the run, which exists.
        configuration: the run's configuration, to be shown with it.

    Raises:
        ValueError: Weights & Biases refuses the run, for example because nobody has logged in.
    """

    def __init__(self, settings: WandbConfig, run_dir: Path, configuration: Mapping[str, Any]) -> None:
        import wandb

        self._error: type[Exception] = wandb.Error
        online = settings.mode == "online"
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run_dir.absolute().name,
                id=_id(run_dir),
                resume="allow" if online else None,  # offline there is nothing to ask; the id says it
                mode=settings.mode,
                dir=str(run_dir),
                config=dict(configuration),
                settings=wandb.Settings(silent=True, console="off"),  # the screen and its log are ours
            )
        except wandb.Error as error:
            raise ValueError(
                f"monitor.wandb: Weights & Biases refuses the run ({' '.join(str(error).split())}): log in with "
                "`wandb login`, or set monitor.wandb.mode to offline"
            ) from None
        self.place = self._run.url if online else f"{run_dir / 'wandb'} (offline: `wandb sync` sends it)"
        """Where the figures are: an address, or a folder."""
        self._run.define_metric("*", step_metric=_STEP)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures of a step, by name.

        Raises:
            OSError: they cannot be written.
        """
        try:
            self._run.log({_STEP: step, **figures})
        except self._error as error:
            raise OSError(str(error)) from None

    def close(self, exit_code: int) -> None:
        """Send what is left, and end this start of the run. A run that is complete does not fail because of this."""
        with contextlib.suppress(Exception):
            self._run.finish(exit_code=exit_code)


def _id(run_dir: Path) -> str:
    """Return the id of the run at Weights & Biases, which the first start of the run draws and writes down."""
    path = run_dir / _ID
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text(encoding="utf-8").strip():
            return known
    drawn = secrets.token_hex(4)
    path.write_text(f"{drawn}\n", encoding="utf-8")
    return drawn
