"""Learning-rate schedules against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest

from megamult.optim.config import OptimizerConfig
from megamult.optim.schedule import lr_factor

DECAYS = ["linear", "cosine", "exponential", "inverse_sqrt"]
EXACT = 1e-12  # a handful of float64 roundings


def schedule(steps: int, **settings: object) -> list[float]:
    """Learning rates of all updates of a run."""
    config = OptimizerConfig(lr=0.4, **settings)  # type: ignore[arg-type]
    return [config.lr * lr_factor(step, steps, config) for step in range(steps)]


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert schedule(5) == [0.4] * 5


def test_warm_up_is_a_line_from_0_that_reaches_the_peak_at_its_last_step() -> None:
    assert schedule(6, warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=EXACT)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_last_update_is_at_min_lr(decay: str) -> None:
    assert schedule(20, decay_steps=7, decay=decay, min_lr=0.05)[-1] == pytest.approx(0.05, rel=EXACT)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_linear_and_cosine_reach_0(decay: str) -> None:
    # cosine leaves one rounding of 1 - 1
    assert schedule(20, decay_steps=7, decay=decay)[-1] == pytest.approx(0.0, abs=1e-16)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_rate_is_at_its_peak_until_the_decay_and_falls_at_each_step_of_it(decay: str) -> None:
    rates = schedule(20, warmup_steps=3, decay_steps=7, decay=decay, min_lr=0.05)
    assert rates[2:13] == pytest.approx([0.4] * 11, rel=EXACT)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[12:]))


@pytest.mark.parametrize("decay", DECAYS)
def test_a_decay_over_the_whole_run_after_warm_up_has_no_constant_part(decay: str) -> None:
    rates = schedule(10, warmup_steps=4, decay_steps=6, decay=decay, min_lr=0.1)
    assert rates[3] == pytest.approx(0.4, rel=EXACT) and rates[4] < 0.4 and rates[-1] == pytest.approx(0.1, rel=EXACT)


@pytest.mark.parametrize("decay", DECAYS)
def test_final_steps_stay_at_min_lr_and_move_the_fall_before_them(decay: str) -> None:
    falling = schedule(20, warmup_steps=3, decay_steps=7, decay=decay, min_lr=0.05)
    staying = schedule(24, warmup_steps=3, decay_steps=7, decay=decay, min_lr=0.05, final_steps=4)
    assert staying == pytest.approx([*falling, *[0.05] * 4], rel=EXACT)


def test_linear_decay_loses_the_same_amount_at_each_step() -> None:
    assert schedule(4, decay_steps=4, min_lr=0.2) == pytest.approx([0.35, 0.3, 0.25, 0.2], rel=EXACT)


def test_cosine_decay_is_half_a_period_of_a_cosine() -> None:
    half = [0.1 + 0.3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert schedule(4, decay_steps=4, decay="cosine", min_lr=0.1) == pytest.approx(half, rel=EXACT)
    assert half[1] == pytest.approx((0.4 + 0.1) / 2)


def test_exponential_decay_loses_the_same_factor_at_each_step() -> None:
    rates = schedule(4, decay_steps=4, decay="exponential", min_lr=0.4 / 16)
    assert rates == pytest.approx([0.2, 0.1, 0.05, 0.025], rel=EXACT)


def test_inverse_sqrt_decay_falls_as_one_over_the_root_of_a_line() -> None:
    rates = schedule(5, decay_steps=5, decay="inverse_sqrt", min_lr=0.1)
    inverse_squares = [rate**-2 for rate in [0.4, *rates]]
    gaps = [b - a for a, b in itertools.pairwise(inverse_squares)]
    assert gaps == pytest.approx([gaps[0]] * 5, rel=1e-10)  # differences of rounded numbers of the same size
    assert gaps[0] > 0
