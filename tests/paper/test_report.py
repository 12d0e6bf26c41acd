"""The report of examples/paper: verdicts of runs whose losses are known, and of runs that are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.paper import e13_placement, e15_log, headline, report
from examples.paper.arms import ALL, NONE, SCALAR
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Grid
from examples.paper.paired import estimate
from tests.paper.settings import losses_of, tiny

SEEDS = (1, 2, 3)


def results(tmp_path: Path, seeds: tuple[int, ...] = SEEDS) -> Results:
    """What an experiment reads, of runs in `tmp_path`."""
    return Results(tiny(), Grid(tmp_path), seeds)


def cells(text: str, claim: str) -> list[str]:
    """Threshold, figures and verdict of the line of a claim."""
    (line,) = (line for line in text.splitlines() if line.startswith("|") and claim in line)
    return [cell.strip() for cell in line.strip("|").split(" | ")][2:]


@pytest.mark.parametrize(
    ("with_it", "verdict"),
    [
        ((4.9, 5.08, 5.2), "reproduced"),
        ((5.1, 5.32, 5.4), "not reproduced"),
        ((4.7, 5.3, 5.35), "not resolved"),
    ],
    ids=["lower", "higher", "either way"],
)
def test_the_headline_is_decided_by_the_paired_difference(
    tmp_path: Path, with_it: tuple[float, ...], verdict: str
) -> None:
    read = results(tmp_path)
    # The spread of the seeds is larger than any difference: it must cancel.
    for seed, without, other in zip(SEEDS, (5.0, 5.2, 5.3), with_it, strict=True):
        losses_of(read.grid, read.setting, NONE["adamw"], seed, [6.0] * 6, without)
        losses_of(read.grid, read.setting, ALL["adamw"], seed, [5.0] * 6, other)
    text = report.write(read, [headline.EXPERIMENT], "the command", tmp_path / "report.md")
    threshold, figures, said = cells(text, "AdamW: the valid loss")
    assert said == f"**{verdict}**" and threshold == "paired difference < -2 SE"
    if verdict == "reproduced":
        # -0.1, -0.12, -0.1: mean -0.10667, sample deviation 0.011547, divided by the root of 3.
        assert figures.startswith("-0.1067 ± 0.0067 nats (-0.1, -0.12, -0.1); -2.06 % of 5.1667")
    # A training loss that differs by 1 for every seed has no spread at all.
    assert cells(text, "AdamW: the mean training loss")[1].startswith("-1 ± 0 nats")
    assert cells(text, "Muon: the valid loss")[1:] == ["muon, none, seed 1: not started", "**not run**"]
    assert "`the command`" in text and "6 in 6 starts, 6 min 0 s" in text
    assert (tmp_path / "report.md").read_text() == text


def test_one_seed_has_an_error_over_the_order_of_the_data(tmp_path: Path) -> None:
    read = results(tmp_path, (1,))
    steps = 120
    gaps = [0.1 if (step // 10) % 2 else 0.3 for step in range(steps)]
    losses_of(read.grid, read.setting, NONE["adamw"], 1, [5.0] * steps, 5.0)
    losses_of(read.grid, read.setting, ALL["adamw"], 1, [5.0 - gap for gap in gaps], 4.9)
    train, valid = (headline.compare(read, NONE["adamw"], ALL["adamw"], kind) for kind in ("train", "valid"))
    # Ten blocks of -0.1 and -0.3 by turns: mean -0.2, sample deviation 0.1 x sqrt(10 / 9), divided by the root of 10.
    assert train.estimate is not None and train.estimate.mean == pytest.approx(-0.2)
    assert train.estimate.error == pytest.approx(0.1 / 3)
    assert train.verdict == "reproduced" and "order of the data" in train.note
    assert valid.verdict == "not resolved"


def test_placements_must_be_worse_than_all(tmp_path: Path) -> None:
    read = results(tmp_path)
    for seed, loss in zip(SEEDS, (5.0, 5.3, 5.1), strict=True):
        for arm, gap in ((ALL["adamw"], 0.0), (e13_placement.SYMMETRY_FREE, 0.01), (e13_placement.NO_EMBEDDING, -0.01)):
            losses_of(read.grid, read.setting, arm, seed, [6.0] * 6, loss + gap * (1 + 0.1 * seed))
        losses_of(read.grid, read.setting, SCALAR, seed, [6.0] * 6, loss)
    text = report.write(read, [e13_placement.EXPERIMENT], "x", tmp_path / "report.md")
    assert cells(text, "symmetry_free is worse")[-1] == "**reproduced**"
    assert cells(text, "all but the embedding is worse")[-1] == "**not reproduced**"
    assert cells(text, "One scalar per matrix")[-1] == "**reported**"
    assert cells(text, "multipliers' learning rate, against all")[-1] == "**not run**"


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.01, 0.012, 0.001), "reproduced"),
        ((0.03, 0.031, 0.029), "not reproduced"),
        ((-0.3, 0.35, 0.01), "not resolved"),
    ],
    ids=["equal", "different", "too noisy"],
)
def test_log_is_equal_to_direct_only_if_the_error_is_small(
    tmp_path: Path, gaps: tuple[float, ...], verdict: str
) -> None:
    read = results(tmp_path)
    for seed, gap in zip(SEEDS, gaps, strict=True):
        losses_of(read.grid, read.setting, ALL["adamw"], seed, [6.0] * 6, 5.0 + seed)
        losses_of(read.grid, read.setting, e15_log.LOG, seed, [6.0] * 6, 5.0 + seed + gap)
        for name, loss in (("direct", 5.2), ("log", 5.0 + 0.01 * seed)):
            losses_of(read.grid, read.setting, e15_log.small_head(read.setting, name), seed, [6.0] * 6, loss)
    text = report.write(read, [e15_log.EXPERIMENT], "x", tmp_path / "report.md")
    assert cells(text, "as good as direct")[-1] == f"**{verdict}**"
    assert cells(text, "does more with log")[-1] == "**reproduced**"
    assert "frozen, S = 0.125, seed 1: not started" in cells(text, "against no multiplier")[-2]


def test_a_run_that_diverged_has_no_figure(tmp_path: Path) -> None:
    read = results(tmp_path)
    for seed in SEEDS:
        losses_of(read.grid, read.setting, NONE["adamw"], seed, [6.0] * 6, 5.0)
        directory = losses_of(read.grid, read.setting, ALL["adamw"], seed, [6.0] * 6, 5.0)
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 1, "valid_loss": null}\n')
    measured = report.measure(headline.EXPERIMENT.claims[0], read)
    assert measured.verdict == "not run" and "diverged" in measured.note


def test_a_plot_is_drawn_of_the_runs_that_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read = results(tmp_path)
    file = tmp_path / "headline.png"
    assert not report.drawn(headline.plot, read, file)
    for seed in SEEDS:
        losses_of(read.grid, read.setting, NONE["adamw"], seed, [6.0] * 6, 5.0)
        losses_of(read.grid, read.setting, ALL["adamw"], seed, [6.0 - seed] * 6, 5.0)
    text = report.write(read, [headline.EXPERIMENT], "x", tmp_path / "report.md")
    assert file.read_bytes().startswith(b"\x89PNG") and "](headline.png)" in text


def test_a_cell_keeps_its_bars_and_figures_say_their_seeds() -> None:
    claim = Claim("text", "|ln x| < 1", lambda results: Measurement(None, "not run"))
    experiment = Experiment("E0", "title", [claim], lambda setting: [], lambda results, file: None)
    line = report.row(experiment, claim, Measurement(estimate([1.0, 3.0]), "reproduced", "a\nnote"))
    assert line == r"| E0 | text | \|ln x\| < 1 | 2 ± 1 (1, 3); a note | **reproduced** |"
    alone = report.row(experiment, claim, Measurement(estimate([1.5]), "not resolved", unit="nats"))
    assert "| 1.5 nats | **not resolved** |" in alone


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    read = results(tmp_path)
    with pytest.raises(NotRun, match="adamw, all, seed 2: not started"):
        read.run(ALL["adamw"], 2)
