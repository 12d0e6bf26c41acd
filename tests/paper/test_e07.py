"""E7 of examples/paper on runs whose growth is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples.paper import e07_residual_growth as e07
from examples.paper import report
from examples.paper.experiment import NotRun, Results
from examples.paper.grid import Grid
from tests.paper.settings import losses_of, tiny

METRICS = (*e07.OUTPUTS, e07.STREAM)


def results(tmp_path: Path, seeds: tuple[int, ...] = (1, 2)) -> Results:
    """What E7 reads, of runs in `tmp_path`."""
    return Results(tiny(), Grid(tmp_path), seeds)


def grown(read: Results, decay: float, seed: int, slopes: list[float], every: int = e07.EVERY) -> None:
    """Write a run whose ln RMS grows by these slopes per 1,000 steps, layer by layer, after a jump at step 600. The MLP
    grows by 0.1 more than attention, and the stream by 1 more."""
    figures = {
        step: {
            f"{metric}/layer_{layer:02d}": math.exp((slope + extra) * step / 1000 + (0.0 if step > 600 else 7.0))
            for metric, extra in zip(METRICS, (-0.05, 0.05, 1.0), strict=True)
            for layer, slope in enumerate(slopes)
        }
        for step in range(every, e07.STEPS + 1, every)
    }
    losses_of(read.grid, read.setting, e07.arm(decay), seed, [5.0], 5.0, figures)


@pytest.mark.parametrize(
    ("default", "large", "verdicts"),
    [
        (0.49, 0.2, ("reproduced", "reproduced", "reproduced")),
        (0.30, 0.3, ("reproduced", "not reproduced", "not reproduced")),
        (0.49, -0.1, ("reproduced", "reproduced", "reproduced")),
    ],
    ids=["as expected", "decay works at its default", "decay turns growth around"],
)
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_slopes_are_those_of_the_last_steps(
    tmp_path: Path, seeds: tuple[int, ...], default: float, large: float, verdicts: tuple[str, ...]
) -> None:
    read = results(tmp_path, seeds)
    for seed in seeds:
        for decay, slope, noise in ((e07.NONE, 0.5, 0.0), (e07.DEFAULT, default, 0.03), (e07.LARGE, large, 0.03)):
            of_seed = seed - sum(seeds) / len(seeds)
            # Noise of layers that cancels in a run's mean, and noise of seeds.
            each = [slope + noise * (1 if layer % 2 else -1) + noise * of_seed for layer in range(e07.LAYERS)]
            grown(read, decay, seed, each)
    growth, halved, default_claim, apart = (claim.measure(read) for claim in e07.CLAIMS)
    assert (growth.verdict, halved.verdict, default_claim.verdict) == verdicts
    assert growth.estimate is not None and growth.estimate.mean == pytest.approx(0.5)
    assert halved.estimate is not None and halved.estimate.mean == pytest.approx(large - 0.5)
    # Two seeds that are 0.03 apart; or eight layers, half of them 0.03 above their mean and half below.
    expected = 0.03 / 2 if len(seeds) > 1 else 0.03 * math.sqrt(8 / 7) / math.sqrt(8)
    assert halved.estimate.error == pytest.approx(expected)
    assert ("SE over layers" in growth.note) == (len(seeds) == 1)
    assert "decay 0: attention_output +0.450, mlp_output +0.550, residual +1.500" in apart.note


def test_growth_that_is_within_its_noise_is_not_resolved(tmp_path: Path) -> None:
    read = results(tmp_path)
    for seed, slope in ((1, 0.3), (2, -0.2)):
        for decay in e07.DECAYS:
            grown(read, decay, seed, [slope] * e07.LAYERS)
    assert e07.grows(read).verdict == "not resolved"


def test_a_run_that_did_not_grow_is_not_halved(tmp_path: Path) -> None:
    read = results(tmp_path)
    for seed in (1, 2):
        for decay, slope in ((e07.NONE, -0.2), (e07.DEFAULT, -0.2), (e07.LARGE, -0.5)):
            grown(read, decay, seed, [slope + 0.001 * seed] * e07.LAYERS)
    assert e07.grows(read).verdict == e07.is_halved(read).verdict == "not reproduced"


def test_figures_at_other_steps_are_refused(tmp_path: Path) -> None:
    read = results(tmp_path, (1,))
    grown(read, e07.NONE, 1, [0.5] * e07.LAYERS, every=50)
    with pytest.raises(NotRun, match="every 10 steps"):
        e07.grows(read)


def test_its_figure_is_drawn_of_the_runs_that_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read, file = results(tmp_path, (1,)), tmp_path / "e7.png"
    assert not report.drawn(e07.plot, read, file)
    grown(read, e07.LARGE, 1, [0.5] * e07.LAYERS)
    assert report.drawn(e07.plot, read, file)
