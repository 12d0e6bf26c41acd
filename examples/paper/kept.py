"""Final losses of runs, kept in a file that outlives the run directories: one JSON line for each run.

Claims about losses need nothing else of a run. With `--kept FILE`, runs in the file are not trained again for these
claims, and complete runs are added. So experiments that take hours can be made in parts, on several machines: a run's
name is a hash of its whole configuration, and its pair with the same seed may come from another machine, whose rounding
is the only difference.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.paper.grid import Grid, Run
from examples.paper.paired import mean_of_last
from examples.running.curves import Curves, DivergedError, read_curves
from examples.running.machine import commit, machine, versions


@dataclass(frozen=True)
class Losses:
    """Losses of a complete run, in nats per token."""

    valid: float
    """Valid loss after the last step; infinity if the run diverged."""
    train: float
    """Mean training loss of the last steps (:func:`mean_of_last`); infinity if the run diverged."""


DIVERGED = Losses(math.inf, math.inf)


@dataclass(frozen=True)
class Line:
    """One run of the file."""

    name: str
    """Name of the run directory, which ends in a hash of the run's configuration."""
    arm: str
    seed: int
    valid: float | None
    """See :class:`Losses`; None if the run diverged, because JSON has no infinity."""
    train: float | None
    commit: str
    software: str
    machine: str
    date: str

    @property
    def losses(self) -> Losses:
        """The losses."""
        return DIVERGED if self.valid is None or self.train is None else Losses(self.valid, self.train)


def read(file: Path) -> dict[str, Line]:
    """Read the file, and return its lines by the runs' names; nothing if there is no such file.

    Raises:
        ValueError: a line cannot be read.
    """
    found: dict[str, Line] = {}
    if not file.exists():
        return found
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: {error}. Remove the line: its run is then trained again"
            ) from error
        found[line.name] = line
    return found


def final(curves: Curves) -> Losses:
    """Return the final losses of a run's curves."""
    return Losses(curves.result, mean_of_last(curves.train))


def add(file: Path, grid: Grid, runs: Iterable[Run]) -> int:
    """Add the runs that are complete or have diverged, and are not in the file, and return their number.

    Raises:
        OSError, ValueError: the losses of a complete run cannot be read.
    """
    known, lines = read(file), []
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    for run in runs:
        if run.name in known or grid.state(run) not in ("complete", "diverged"):
            continue
        valid = train = None
        if grid.state(run) == "complete":
            with contextlib.suppress(DivergedError):
                found = final(read_curves(grid.directory(run)))
                valid, train = found.valid, found.train
        lines.append(Line(run.name, run.arm, run.seed, valid, train, commit(), versions(), machine(), today))
    if lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.writelines(f"{json.dumps(asdict(line))}\n" for line in lines)
    return len(lines)
