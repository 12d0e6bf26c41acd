"""What an experiment is: its claims with thresholds, its arms, and functions that measure the claims and plot.

A new experiment is one module with an :class:`Experiment`, named in `examples/paper/package.py`. Claims and thresholds
are constants at the top of the module, and are committed before a run is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from examples.paper.grid import Arm, Grid, Run, make_run
from examples.paper.kept import DIVERGED, Line, Losses, final
from examples.paper.paired import LAST_STEPS, Estimate, Verdict, paired, paired_over_steps
from examples.paper.setting import Setting
from examples.running.curves import Curves, DivergedError, read_curves, read_records
from megamult.checkpoint.saved import SavedCheckpoint

Loss = Literal["valid", "train"]
LOSSES: dict[Loss, str] = {"valid": "valid loss", "train": f"mean training loss of the last {LAST_STEPS} steps"}
"""Losses by which runs are compared, in words."""


class NotRun(Exception):
    """Runs that a claim needs are not complete."""


@dataclass(frozen=True)
class Measurement:
    """Measured figure of a claim."""

    estimate: Estimate | None
    """Figure with its standard error; None if there is none."""
    verdict: Verdict
    note: str = ""
    """Further figures, in a few words."""
    unit: str = ""


@dataclass(frozen=True)
class Claim:
    """Statement of the paper, the threshold at which it counts as reproduced, and how it is measured."""

    text: str
    threshold: str
    measure: Callable[[Results], Measurement]
    """Function that raises NotRun if runs are missing."""


@dataclass(frozen=True)
class Experiment:
    """Experiment of the paper."""

    name: str
    """Name that `--only` takes."""
    title: str
    claims: Sequence[Claim]
    arms: Callable[[Setting], Sequence[Arm]]
    """Function that returns the arms of the package."""
    plot: Callable[[Results, Path], None]
    """Function that draws the figure of the report into a file, or raises NotRun."""
    full_arms: Callable[[Setting], Sequence[Arm]] = lambda setting: ()
    """Function that returns further arms, which `--full` adds."""
    decided: Callable[[Results], Sequence[Arm]] = lambda results: ()
    """Function that returns further arms, of all seeds, which the results of `arms` decide, such as those with the best
    learning rate. It raises NotRun until these results are there, or leaves out what is not decided yet."""
    seeds: int | None = None
    """Number of seeds of `arms` in the package, the first of those given; None means all. `--full` runs all."""
    package: bool = True
    """Whether the package trains the arms. If not, only `--full` and `--only` do."""
    losses_only: bool = False
    """Whether the claims need only final losses of runs, so that kept ones are enough (`examples/paper/kept.py`)."""


class Results:
    """The complete runs of a setting, as an experiment reads them.

    Args:
        setting: the setting.
        grid: folder with the runs.
        seeds: seeds that every claim needs.
        kept: kept losses by the runs' names (`examples/paper/kept.py`), for runs that are not in the folder.
    """

    def __init__(self, setting: Setting, grid: Grid, seeds: Sequence[int], kept: Mapping[str, Line] = {}) -> None:
        self.setting, self.grid, self.seeds, self.kept = setting, grid, tuple(seeds), kept
        self._kept_read: set[str] = set()
        self._curves: dict[str, Curves] = {}
        self._records: dict[str, list[dict[str, Any]]] = {}

    def first_seeds(self, count: int) -> Results:
        """Return the same runs, of which only the first seeds count."""
        return self._with(self.seeds[:count])

    def later_seeds(self) -> Results:
        """Return the same runs, of which the first seed does not count.

        Raises:
            NotRun: there is no other seed.
        """
        if len(self.seeds) < 2:
            raise NotRun("the first seed has chosen the runs, and there is no other: give more --seeds")
        return self._with(self.seeds[1:])

    def _with(self, seeds: Sequence[int]) -> Results:
        """Return the same runs, of which only these seeds count."""
        other = Results(self.setting, self.grid, seeds, self.kept)
        other._kept_read = self._kept_read
        return other

    def kept_lines_read(self) -> list[Line]:
        """List the kept losses that were read so far."""
        return [self.kept[name] for name in sorted(self._kept_read)]

    def run(self, arm: Arm, seed: int) -> Run:
        """Return a run.

        Raises:
            NotRun: it is not complete.
        """
        run = make_run(self.setting, arm, seed)
        state = self.grid.state(run)
        if state == "diverged":
            raise NotRun(f"{run.label}: diverged") from DivergedError()
        if state != "complete":
            raise NotRun(f"{run.label}: {state}")
        return run

    def curves(self, arm: Arm, seed: int) -> Curves:
        """Return the losses of a run.

        Raises:
            NotRun: the run is not complete, or has no result because it diverged.
        """
        run = self.run(arm, seed)
        if run.name not in self._curves:
            try:
                self._curves[run.name] = read_curves(self.grid.directory(run))
            except (OSError, ValueError) as error:
                raise NotRun(str(error)) from error
        return self._curves[run.name]

    def losses(self, arm: Arm, seed: int) -> Losses:
        """Return the final losses of a run: of its directory, or else the kept ones. They are infinite if it diverged.

        Raises:
            NotRun: the run is not complete, and no losses of it are kept.
        """
        run = make_run(self.setting, arm, seed)
        if run.name in self.kept and self.grid.state(run) not in ("complete", "diverged"):
            self._kept_read.add(run.name)
            return self.kept[run.name].losses
        try:
            return final(self.curves(arm, seed))
        except NotRun as error:
            if isinstance(error.__cause__, DivergedError):
                return DIVERGED
            raise

    def loss(self, arm: Arm, seed: int) -> float:
        """Return the valid loss of a run after the last step; infinity if it diverged.

        Raises:
            NotRun: the run is not complete.
        """
        return self.losses(arm, seed).valid

    def first_loss(self, arm: Arm) -> float:
        """Return the valid loss of an arm with the first seed (:meth:`loss`)."""
        return self.loss(arm, self.seeds[0])

    def all_curves(self, arm: Arm) -> list[Curves]:
        """Return the losses of an arm's runs, seed by seed."""
        return [self.curves(arm, seed) for seed in self.seeds]

    def valid(self, arm: Arm) -> list[float]:
        """Return the valid losses after the last step, seed by seed."""
        return [losses.valid for losses in self._finite(arm)]

    def train(self, arm: Arm) -> list[float]:
        """Return the training losses over the last steps, seed by seed (:func:`mean_of_last`)."""
        return [losses.train for losses in self._finite(arm)]

    def _finite(self, arm: Arm) -> list[Losses]:
        """Return the final losses of an arm's runs, seed by seed.

        Raises:
            NotRun: a run is not complete, or has no result because it diverged.
        """
        found = [self.losses(arm, seed) for seed in self.seeds]
        for seed, losses in zip(self.seeds, found, strict=True):
            if losses == DIVERGED:
                raise NotRun(f"{make_run(self.setting, arm, seed).label}: diverged") from DivergedError()
        return found

    def gap(self, kind: Loss, without: Arm, with_it: Arm) -> Estimate:
        """Return the paired difference of a loss, `with_it` - `without`.

        With one seed, that of the training loss has an error over the order of the data
        (:func:`paired_over_steps`), and that of the valid loss has none.
        """
        if kind == "train" and len(self.seeds) == 1:
            return paired_over_steps(*(self.all_curves(arm)[0].train for arm in (without, with_it)))
        return paired(*((self.train if kind == "train" else self.valid)(arm) for arm in (without, with_it)))

    def note(self, units: str, *words: str) -> str:
        """Return a claim's note: the words, after a remark, if there is one seed, that the error is over `units`."""
        return "; ".join([*([f"SE over {units}"] if len(self.seeds) == 1 else []), *words])

    def series(self, arm: Arm, seed: int, name: str) -> dict[int, float]:
        """Return a figure of a run by step, such as `grad_norm` or `mlp_output_rms/layer_00` (docs/monitoring.md).

        Raises:
            NotRun: the run is not complete, does not record the figure, or has a value that is not finite.
        """
        run = self.run(arm, seed)
        if run.name not in self._records:
            try:
                self._records[run.name] = read_records(self.grid.directory(run))
            except (OSError, ValueError) as error:
                raise NotRun(str(error)) from error
        found = {record["step"]: record[name] for record in self._records[run.name] if name in record}
        if not found or None in found.values():
            raise NotRun(f"{run.label}: {name} is {'not finite at some step' if found else 'not recorded'}")
        return found

    def checkpoint(self, arm: Arm, seed: int, step: int) -> SavedCheckpoint:
        """Open the checkpoint of a step.

        Raises:
            NotRun: the run is not complete, or did not keep this checkpoint.
        """
        path = self.grid.directory(self.run(arm, seed)) / "checkpoints" / f"step_{step}"
        if not path.is_dir():
            raise NotRun(f"there is no {path}")
        return SavedCheckpoint(path)

    @cached_property
    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that every run keeps."""
        keys: Mapping[str, Any] = self.setting.keys
        every = int(keys["checkpoint.keep_every"])
        return sorted({*range(every, self.setting.steps + 1, every), self.setting.steps})
