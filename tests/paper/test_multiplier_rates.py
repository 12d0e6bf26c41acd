"""Learning rate of the multipliers: which losses choose it, and which count."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.paper import multiplier_rates as rates
from examples.paper.arms import NONE, OPTIMIZERS
from examples.paper.experiment import NotRun, Results
from examples.paper.grid import Grid
from tests.paper.settings import losses_of, tiny

BEST = 0.25


def trained(folder: Path, gaps: tuple[float, ...]) -> Results:
    """Runs of which g = BEST has the lowest loss with the first seed, 1 nat below none, and whose other seeds differ
    from none by `gaps`. At every other g the first seed loses 0.1 nats."""
    read = Results(tiny(), Grid(folder), (1, 2, 3, 4)[: 1 + len(gaps)])
    for optimizer in OPTIMIZERS:
        for seed, gap in zip(read.seeds, (-1.0, *gaps), strict=True):
            arms = rates.swept(read.setting, optimizer)
            losses_of(read.grid, read.setting, NONE[optimizer], seed, [6.0] * 6, 5.0 + seed)
            losses_of(read.grid, read.setting, arms[BEST], seed, [6.0] * 6, 5.0 + seed + gap)
        for arm in (arm for g, arm in rates.swept(read.setting, optimizer).items() if g != BEST):
            losses_of(read.grid, read.setting, arm, 1, [6.0] * 6, 6.1)
    return read


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.03, -0.02, -0.04), "reproduced"),
        ((0.03, 0.02, 0.04), "not reproduced"),
        ((0.01, -0.01, 0.02), "not resolved"),
    ],
)
def test_the_seed_that_chose_the_rate_does_not_count(tmp_path: Path, gaps: tuple[float, ...], verdict: str) -> None:
    read = trained(tmp_path, gaps)
    assert rates.chosen(read) == BEST
    for optimizer in OPTIMIZERS:
        measured = rates.compare(read, optimizer)
        assert measured.verdict == verdict and measured.estimate is not None
        assert measured.estimate.values == pytest.approx(gaps)


def test_one_seed_chooses_a_rate_and_measures_nothing(tmp_path: Path) -> None:
    read = trained(tmp_path, ())
    assert rates.chosen(read) == BEST
    with pytest.raises(NotRun, match="give more --seeds"):
        rates.compare(read, "adamw")
