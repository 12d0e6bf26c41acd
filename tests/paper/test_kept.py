"""Kept losses of runs stand for the runs, where losses are all that a claim needs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from examples.paper import e13_placement, kept, package, report
from examples.paper.arms import ALL, SCALAR
from examples.paper.experiment import Experiment, NotRun, Results
from examples.paper.grid import Arm, Grid, make_run, plan
from examples.running.attempts import record_attempt
from megamult.runtime import exit_codes
from tests.paper.settings import losses_of, tiny

SEEDS = (1, 2)
ARMS = (ALL["adamw"], SCALAR)


def test_a_report_from_kept_losses_has_the_figures_of_the_runs(tmp_path: Path) -> None:
    setting, grid, file = tiny(), Grid(tmp_path / "runs"), tmp_path / "runs.jsonl"
    for seed in SEEDS:
        for number, arm in enumerate(ARMS):
            losses_of(grid, setting, arm, seed, [6.0, 5.5, 5.0 - number], 5.0 + 0.1 * seed + number / 3)
    whole = Results(setting, grid, SEEDS)
    assert kept.add(file, grid, plan(setting, [*ARMS, Arm("of nobody", {"optimizer.lr": 1.0})], SEEDS)) == 4
    assert kept.add(file, grid, plan(setting, ARMS, SEEDS)) == 0
    text = report.write(whole, [e13_placement.EXPERIMENT], "x", tmp_path / "whole.md")
    assert "kept losses" not in text
    expected = [(whole.valid(arm), whole.train(arm)) for arm in ARMS]
    shutil.rmtree(tmp_path / "runs")
    read = Results(setting, grid, SEEDS, kept.read(file))
    for arm, (valid, train) in zip(ARMS, expected, strict=True):
        assert (read.valid(arm), read.train(arm)) == (valid, train)
        assert read.first_seeds(1).valid(arm) == valid[:1]
    (tmp_path / "runs").mkdir()
    again = report.write(read, [e13_placement.EXPERIMENT], "x", tmp_path / "again.md")
    rows = [[line for line in each.splitlines() if line.startswith("| E13")] for each in (text, again)]
    assert rows[0] == rows[1] and any("±" in line for line in rows[0])
    assert "- 4 runs read from kept losses: " in again
    # What needs more than final losses has none.
    with pytest.raises(NotRun, match="seed 1: not started"):
        read.curves(ALL["adamw"], 1)


def test_a_run_that_diverged_is_kept_as_infinite(tmp_path: Path) -> None:
    setting, grid, file = tiny(), Grid(tmp_path), tmp_path / "runs.jsonl"
    run = make_run(setting, SCALAR, 1)
    grid.directory(run).mkdir()
    record_attempt(grid.directory(run), 1.0, exit_codes.DIVERGED)
    assert kept.add(file, grid, [run]) == 1 and "Infinity" not in file.read_text()
    read = Results(setting, Grid(tmp_path / "none"), [1], kept.read(file))
    assert read.loss(SCALAR, 1) == math.inf
    with pytest.raises(NotRun, match="diverged"):
        read.valid(SCALAR)


@pytest.mark.parametrize("losses_only", [True, False])
def test_a_kept_run_is_trained_again_only_where_more_than_losses_is_needed(tmp_path: Path, losses_only: bool) -> None:
    setting, grid, file = tiny(), Grid(tmp_path / "runs"), tmp_path / "runs.jsonl"
    losses_of(grid, setting, SCALAR, 1, [6.0], 5.0)
    kept.add(file, grid, plan(setting, [SCALAR], [1]))
    read = Results(setting, Grid(tmp_path / "none"), [1, 2], kept.read(file))
    experiment = Experiment("E", "", [], lambda setting: ARMS, lambda results, file: None, losses_only=losses_only)
    wanted = {(run.arm, run.seed) for run in package.chosen_runs(read, [experiment])}
    every = {(arm.name, seed) for arm in ARMS for seed in SEEDS}
    assert wanted == (every - {(SCALAR.name, 1)} if losses_only else every)


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert kept.read(file) == {}
    for bad in ("{", '{"name": "a"}', "[1]"):
        file.write_text(bad + "\n")
        with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: .*Remove the line"):
            kept.read(file)
