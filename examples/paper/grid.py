"""Grid of runs: arms x seeds, some of them side by side. Complete runs are not repeated and interrupted ones go on.

Every run is one process of `launch/pretrain.py` with one thread. Beside its run directory are its configuration
(NAME.yaml, which the run reads), its output (NAME.log) and its starts (NAME.attempts.jsonl). NAME ends in a hash of the
whole configuration: experiments that ask for the same configuration share the run, whatever they call the arm.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import yaml

from examples.paper.setting import Setting
from examples.running.attempts import attempts, complete, record_attempt
from examples.running.children import ROOT, Children, Interrupted, last_lines
from megamult.monitor.screen import duration
from megamult.runtime import exit_codes

PRETRAIN = ROOT / "launch" / "pretrain.py"

_LABEL_LETTERS = 60
"""Most letters of a run's name before seed and hash."""


@dataclass(frozen=True)
class Arm:
    """One variant in an experiment: a name, and the keys in which it differs from the setting."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    name: str
    """Name of the run directory. It depends on the configuration only, not on the arm's name."""
    configuration: Mapping[str, Any] = field(repr=False, compare=False)
    """All keys that the run is given, flat."""

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Failure:
    """Run that ended with an error."""

    run: Run
    exit_code: int
    log: Path

    def __str__(self) -> str:
        return f"{self.run.label} ended with exit code {self.exit_code}. {self.log} ends:\n{last_lines(self.log)}"


def make_run(setting: Setting, arm: Arm, seed: int) -> Run:
    """Return the run of an arm with a seed."""
    configuration = setting.configuration({**arm.overrides, "train.seed": seed})
    identity = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:10]
    optimizer = configuration["optimizer.name"]
    usual = setting.configuration({"optimizer.name": optimizer, "train.seed": seed})
    changed = [
        f"{key.rpartition('.')[2]}_{value}" for key, value in sorted(configuration.items()) if usual.get(key) != value
    ]
    label = re.sub(r"[^\w.-]", "", "-".join([optimizer, *changed]))[:_LABEL_LETTERS]
    return Run(arm.name, seed, f"{label}-seed_{seed}-{identity}", configuration)


def plan(setting: Setting, arms: Iterable[Arm], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of all arms, seed by seed, each configuration once."""
    known = list(arms)
    found: dict[str, Run] = {}
    for seed in seeds:
        for arm in known:
            run = make_run(setting, arm, seed)
            found.setdefault(run.name, run)
    return list(found.values())


def nested(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat keys as nested mappings: {"optimizer.lr": 1} becomes {"optimizer": {"lr": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in configuration.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def pretrain(run: Run, folder: Path) -> list[str]:
    """Return the command of a run in `folder`."""
    return [
        *(sys.executable, str(PRETRAIN), "--config", str(folder / f"{run.name}.yaml")),
        *("--train.run_dir", str(folder / run.name), "--checkpoint.load", "latest"),
    ]


class Grid:
    """Runs in one folder.

    Args:
        folder: folder of all runs of one setting.
        command: function that returns the command of a run.
        say: function that prints a line.
    """

    def __init__(
        self,
        folder: Path,
        command: Callable[[Run, Path], list[str]] = pretrain,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.folder, self._command, self._say = folder, command, say

    def directory(self, run: Run) -> Path:
        """Return the run directory."""
        return self.folder / run.name

    def state(self, run: Run) -> str:
        """Return how far a run is: complete, diverged, interrupted, failed (its last start), or not started."""
        made = attempts(self.directory(run))
        if complete(made):
            return "complete"
        # A start that was killed together with this program has left a directory and no record.
        if not made:
            return "interrupted" if self.directory(run).exists() else "not started"
        return {exit_codes.RESUME: "interrupted", exit_codes.DIVERGED: "diverged"}.get(made[-1].exit_code, "failed")

    def train(self, runs: Sequence[Run], workers: int = 2) -> list[Failure]:
        """Train the runs that are neither complete nor diverged, `workers` of them side by side.

        A run that fails does not stop the others. One that diverges is a result: it would diverge again.

        Returns:
            The runs that failed.

        Raises:
            Interrupted: this process got a signal, or a run was stopped by one. The same call continues.
            ValueError: the folder holds a run of the same name with another configuration.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            self.claim(run)
        waiting = deque(run for run in runs if self.state(run) not in ("complete", "diverged"))
        done, began = len(runs) - len(waiting), time.monotonic()
        if done:
            self._say(f"{done} of {len(runs)} runs need no more training")
        finished, stopped, failures = 0, False, []
        running: dict[Popen[bytes], tuple[Run, float]] = {}
        with Children() as children:
            while waiting or running:
                while waiting and len(running) < workers and not children.asked:
                    running |= self._started(children, waiting.popleft())
                if not running:
                    break
                child = children.wait()
                run, since = running.pop(child)
                code, seconds = child.returncode, time.monotonic() - since
                record_attempt(self.directory(run), seconds, code)
                finished += 1
                left = len(waiting) + len(running)
                remaining = (time.monotonic() - began) / finished * left
                self._say(
                    f"[{done + finished}/{len(runs)}] {run.label}: {_ended(code)} after {duration(seconds)}"
                    + (f"; about {duration(remaining)} left" if left and not children.asked else "")
                )
                stopped |= code == exit_codes.RESUME
                if code not in (0, exit_codes.RESUME, exit_codes.DIVERGED):
                    failures.append(Failure(run, code, self._log(run)))
            if children.asked or stopped:
                raise Interrupted
        return failures

    def _started(self, children: Children, run: Run) -> dict[Popen[bytes], tuple[Run, float]]:
        """Start a run, and return it by its process; nothing if a signal has come in between."""
        going_on = "going on" if self.state(run) != "not started" else "training"
        try:
            child = children.start(self._command(run, self.folder), self._log(run), {"OMP_NUM_THREADS": "1"})
        except Interrupted:
            return {}
        self._say(f"{run.label}: {going_on}; its output is in {self._log(run)}")
        return {child: (run, time.monotonic())}

    def _log(self, run: Run) -> Path:
        return self.folder / f"{run.name}.log"

    def claim(self, run: Run) -> None:
        """Write the configuration that the run reads, or check that it is the one asked for."""
        file = self.folder / f"{run.name}.yaml"
        asked = nested(run.configuration)
        if not file.exists():
            file.write_text(yaml.safe_dump(asked, sort_keys=False), encoding="utf-8")
        elif yaml.safe_load(file.read_text(encoding="utf-8")) != asked:
            raise ValueError(
                f"{file} is not the configuration of {run.label}: somebody has changed it; remove {run.name}* from "
                f"{self.folder}, or give another --output"
            )


def _ended(code: int) -> str:
    words = {0: "complete", exit_codes.RESUME: "saved and stopped", exit_codes.DIVERGED: "diverged"}
    return words.get(code, f"FAILED with exit code {code}")
