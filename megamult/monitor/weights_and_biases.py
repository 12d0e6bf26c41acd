"""Weights & Biases as a further output of a run's figures, beside metrics.jsonl and TensorBoard.

The package `wandb` is imported only where a run uses it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamult.monitor.config import WandbConfig
from megamult.runtime.console import reason_of

_ID = "wandb_id"
"""File in the run directory with the id of the run at Weights & Biases."""
_STEP = "step"
SEND_SECONDS = 300.0
"""Seconds that the end of a run waits for figures to be sent. The files of those that were not sent stay."""
_OLDEST = (0, 27)
"""Oldest version of the package that is used: earlier ones wait without a limit."""


def check(settings: WandbConfig) -> None:
    """Check that the package is there and new enough, if the settings need it.

    Raises:
        ValueError: it is not.
    """
    if settings.project is None:
        return
    what = None
    if importlib.util.find_spec("wandb") is None:
        what = "not installed"
    else:
        found = importlib.metadata.version("wandb")
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
            what = f"of version {found}, older than {'.'.join(map(str, _OLDEST))}"
    if what is not None:
        raise ValueError(
            f"monitor.wandb.project is {settings.project!r} and the package wandb is {what}: pip install "
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
                settings=wandb.Settings(
                    silent=True,  # the screen and its log are ours
                    console="off",
                    finish_timeout=SEND_SECONDS,
                    finish_timeout_raises=True,
                ),
            )
        except wandb.Error as error:
            raise ValueError(
                f"monitor.wandb: Weights & Biases refuses the run ({reason_of(error)}): log in with "
                "`wandb login`, or set monitor.wandb.mode to offline"
            ) from None
        self._unsent = (
            f"`wandb sync --no-skip-online {run_dir / 'wandb'}` sends what is missing there"
            if online
            else f"the last figures may be missing in {run_dir / 'wandb'}"
        )
        self.place = self._run.url if online else f"{run_dir / 'wandb'} (offline: `wandb sync` sends it)"
        """Where the figures are: an address, or a folder."""
        self._run.define_metric("*", step_metric=_STEP)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures of a step, by name. Errors are those of the package `wandb`."""
        self._run.log({_STEP: step, **figures})

    def close(self, exit_code: int) -> str | None:
        """Send what is left, for at most `SEND_SECONDS`, and end this start of the run.

        Returns:
            A warning if this took too long or failed, else None. The run's own result does not depend on it. Data that
            Weights & Biases refuses is only in the logs under `run_dir`/wandb.
        """
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            return f"monitor.wandb: the run could not be ended at Weights & Biases ({reason_of(error)}): {self._unsent}"
        return None


def _id(run_dir: Path) -> str:
    """Return the id of the run at Weights & Biases, which the first start of the run draws and writes down."""
    path = run_dir / _ID
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text(encoding="utf-8").strip():
            return known
    drawn = secrets.token_hex(4)
    path.write_text(f"{drawn}\n", encoding="utf-8")
    return drawn
