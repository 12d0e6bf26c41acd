"""E9 of examples/paper on runs whose norms and losses are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples.paper import e09_clipping as e09
from examples.paper import report
from examples.paper.experiment import NotRun, Results
from examples.paper.grid import Grid
from megamult.multipliers.config import MultiplierClip
from tests.paper.settings import losses_of, tiny

STEPS = 120


def results(tmp_path: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> Results:
    """What E9 reads, of runs in `tmp_path`."""
    return Results(tiny(), Grid(tmp_path), seeds)


def ran(
    read: Results, clip: MultiplierClip, s: float, seed: int, loss: float, norms: list[tuple[float, float]]
) -> None:
    """Write a run with this loss and, by turns of ten steps, these norms of all but the multipliers and of them."""
    figures = {
        step: dict(zip(("grad_norm", "multiplier_grad_norm"), norms[step % 10 % len(norms)], strict=True))
        for step in range(1, STEPS + 1)
    }
    losses_of(read.grid, read.setting, e09.arm(clip, s), seed, [loss] * STEPS, loss, figures)


HARD, LONE, SMALL = (1.0, 4.0), (2.5, 4.0), (0.1, 0.4)
"""Both conditions hold; the factor is small, and the ratio is 1.9; the ratio is 4.1, and nothing is clipped."""


@pytest.mark.parametrize(
    ("hard", "other", "verdict", "share"),
    [
        (6, SMALL, "reproduced", 0.6),
        (4, SMALL, "not reproduced", 0.4),
        (4, LONE, "not reproduced", 0.4),
    ],
)
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_multipliers_must_dominate_the_norm_and_gradients_be_clipped_hard_in_the_same_steps(
    tmp_path: Path,
    seeds: tuple[int, ...],
    hard: int,
    other: tuple[float, float],
    verdict: str,
    share: float,
) -> None:
    read = results(tmp_path, seeds)
    with pytest.raises(NotRun):
        e09.dominates(read)
    for seed in seeds:
        ran(read, "joint", e09.SMALL, seed, 5.0, [HARD] * hard + [other] * (10 - hard))
    measured = e09.dominates(read)
    assert measured.verdict == verdict
    assert measured.estimate is not None and measured.estimate.mean == pytest.approx(share)


def test_factors_are_those_of_the_runs_own_clipping(tmp_path: Path) -> None:
    read = results(tmp_path, (1,))
    ran(read, "joint", 1.0, 1, 5.0, [(3.0, 4.0)])
    ran(read, "out", 1.0, 1, 5.0, [(3.0, 4.0)])
    joint, out = (e09.clipped(read, clip, 1.0, 1)[7] for clip in ("joint", "out"))
    # The rule adds 1e-6 to the norm.
    assert joint.factor == pytest.approx(1 / 5, rel=1e-6) and out.factor == pytest.approx(1 / 3, rel=1e-6)
    assert joint.factor_without == out.factor_without == out.factor


@pytest.mark.parametrize(
    ("treated", "control", "verdicts"),
    [
        (0.05, 0.0, ("reproduced", "reproduced")),
        (0.05, 0.04, ("reproduced", "not reproduced")),
        (-0.05, 0.0, ("not reproduced", "reproduced")),
        (0.001, 0.0, ("not resolved", "not resolved")),
    ],
)
def test_joint_must_be_worse_and_the_control_the_same(
    tmp_path: Path, treated: float, control: float, verdicts: tuple[str, str]
) -> None:
    read = results(tmp_path)
    for seed, noise in zip(read.seeds, (-0.003, 0.0, 0.003), strict=True):
        for s, gap in ((e09.SMALL, treated), (1.0, control)):
            ran(read, "out", s, seed, 5.0 + seed, [(0.5, 0.1)])
            ran(read, "joint", s, seed, 5.0 + seed + gap + noise, [(0.5, 0.1)])
    claims = {claim.text: claim.measure(read) for claim in e09.CLAIMS}
    for loss in ("valid loss", "mean training loss of the last 100 steps"):
        worse = claims[f"s = 1/16: the {loss} is higher with multipliers in the norm"]
        same = claims[f"Control, s = 1: the {loss} is the same"]
        assert (worse.verdict, same.verdict) == verdicts
        assert worse.estimate is not None and worse.estimate.mean == pytest.approx(treated)
        assert worse.estimate.error == pytest.approx(0.003 / math.sqrt(3))


@pytest.mark.parametrize(("main", "verdict"), [(0.9, "reproduced"), (1.6, "not reproduced")])
def test_the_control_must_hardly_be_clipped(tmp_path: Path, main: float, verdict: str) -> None:
    read = results(tmp_path, (1,))
    ran(read, "joint", 1.0, 1, 5.0, [(main, 0.3)])
    measured = e09.control_is_not_clipped(read)
    assert measured.verdict == verdict
    assert measured.estimate is not None
    assert measured.estimate.mean == pytest.approx(min(1.0, 1 / math.hypot(main, 0.3)), rel=1e-5)
    assert f"without multipliers {min(1.0, 1 / main):.3f}" in measured.note


def test_a_run_of_fewer_steps_has_no_early_steps(tmp_path: Path) -> None:
    read = results(tmp_path, (1,))
    figures = {step: {"grad_norm": 1.0, "multiplier_grad_norm": 1.0} for step in range(1, 7)}
    losses_of(read.grid, read.setting, e09.arm("joint", 1.0), 1, [5.0] * 6, 5.0, figures)
    with pytest.raises(NotRun, match="fewer than 100 steps"):
        e09.control_is_not_clipped(read)


def test_its_figure_is_drawn_of_the_pairs_that_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read, file = results(tmp_path, (1,)), tmp_path / "e9.png"
    ran(read, "joint", 1.0, 1, 5.0, [HARD])
    assert not report.drawn(e09.plot, read, file)
    ran(read, "out", 1.0, 1, 5.0, [HARD])
    assert report.drawn(e09.plot, read, file)
