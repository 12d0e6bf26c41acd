"""Statistics of examples/paper against plain references."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from examples.paper.paired import (
    Estimate,
    coefficient_of_variation,
    equal,
    estimate,
    exponent,
    mean_of_last,
    over_seeds,
    over_steps,
    paired,
    paired_over_steps,
    slope,
    spearman,
    verdict,
    within,
)


def test_a_paired_difference_has_the_mean_and_the_standard_error_of_the_seeds_differences() -> None:
    without, with_it = [5.0, 5.4, 5.2], [4.9, 5.1, 5.15]
    found = paired(without, with_it)
    gaps = [b - a for a, b in zip(without, with_it, strict=True)]
    assert found.values == pytest.approx(gaps)
    assert found.mean == pytest.approx(statistics.mean(gaps))
    assert found.error == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    assert math.isnan(paired([5.0], [4.0]).error)


def test_the_mean_loss_is_that_of_the_last_steps_alone() -> None:
    losses = {step: 100.0 if step <= 100 else float(step % 2) for step in range(1, 201)}
    assert mean_of_last(losses) == 0.5
    assert mean_of_last({1: 3.0, 2: 5.0}) == 4.0


def test_the_error_over_steps_is_that_of_blocks() -> None:
    draw = np.random.default_rng(0)
    # Each value stands for ten steps: the error of single steps would be too small by the root of ten.
    noise = np.repeat(draw.standard_normal(10), 10)
    without = dict.fromkeys(range(1, 201), 5.0)
    with_it = {step: 5.0 + (7.0 if step <= 100 else noise[step - 101]) for step in range(1, 201)}
    found = paired_over_steps(without, with_it)
    blocks = noise[::10].tolist()
    assert found.mean == pytest.approx(statistics.mean(blocks))
    assert found.error == pytest.approx(statistics.stdev(blocks) / math.sqrt(10))
    with pytest.raises(ValueError, match="different steps"):
        paired_over_steps(without, dict.fromkeys(range(1, 200), 5.0))
    with pytest.raises(ValueError, match="at least 2"):
        paired_over_steps({1: 1.0}, {1: 2.0})


def test_one_seed_has_an_error_within_itself_and_several_have_that_of_their_means() -> None:
    layers = [[1.0, 2.0, 6.0], [2.0, 2.0, 2.0]]
    several = over_seeds(layers)
    assert several.values == (3.0, 2.0) and several.error == pytest.approx(0.5)
    one = over_seeds(layers[:1])
    assert one.values == (3.0,) and one.error == pytest.approx(statistics.stdev(layers[0]) / math.sqrt(3))
    steps = [100.0] * 5 + [0.0] * 10 + [1.0] * 10  # the first five are no whole block
    of_steps = over_seeds([steps], over_steps)
    assert of_steps.mean == 0.5 and of_steps.error == pytest.approx(0.5)


def test_a_slope_and_its_error_are_those_of_polyfit() -> None:
    draw = np.random.default_rng(1)
    x = draw.uniform(-1, 3, 12)
    y = 0.5 - 2.0 * x + 0.3 * draw.standard_normal(12)
    found = slope(x.tolist(), y.tolist())
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert found.value == pytest.approx(coefficients[0])
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]))
    with pytest.raises(ValueError, match="at least 3 points"):
        slope([1.0, 2.0], [1.0, 2.0])


def test_an_exponent_is_that_of_a_power_and_one_seed_has_the_error_of_its_fit() -> None:
    x = [64.0, 128.0, 256.0, 512.0]
    lines = [[3 * value**-0.5 for value in x], [value**-0.7 for value in x]]
    several = exponent(x, lines)
    assert several.values == pytest.approx((-0.5, -0.7)) and several.error == pytest.approx(0.1)
    bent = [1.0, 2.0, 4.0, 4.0]
    fit = slope([math.log(value) for value in x], [math.log(value) for value in bent])
    one = exponent(x, [bent])
    assert one.mean == pytest.approx(fit.value) and one.error == pytest.approx(fit.error) and fit.error > 0.1


def test_spearman_is_the_formula_without_ties_and_shares_ranks_with_them() -> None:
    draw = np.random.default_rng(2)
    x, y = draw.standard_normal(9), draw.standard_normal(9)
    squares = sum((np.sum(x < a) - np.sum(y < b)) ** 2 for a, b in zip(x, y, strict=True))
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(1 - 6 * squares / (9 * 80))
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5.
    assert spearman([10.0, 20.0, 20.0, 90.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))


def test_the_coefficient_of_variation_is_deviation_over_mean() -> None:
    values = [2.0, 4.0, 4.0, 6.0]
    assert coefficient_of_variation(values) == pytest.approx(statistics.pstdev(values) / 4.0)


@pytest.mark.parametrize(
    ("holds", "values", "said"),
    [
        (True, (-0.10, -0.11, -0.12), "reproduced"),
        (False, (0.10, 0.11, 0.12), "not reproduced"),
        (True, (-0.3, 0.1, -0.1), "not resolved"),
        (False, (-0.3, 0.1, -0.1), "not resolved"),
        (True, (-0.1,), "not resolved"),
    ],
    ids=["holds", "fails", "noisy and holds", "noisy and fails", "one seed"],
)
def test_an_effect_within_two_standard_errors_is_not_resolved(
    holds: bool, values: tuple[float, ...], said: str
) -> None:
    assert verdict(holds, estimate(values)) == said


def test_an_effect_of_two_standard_errors_is_resolved() -> None:
    assert verdict(True, Estimate(-0.2, 0.1, ())) == "reproduced"
    assert verdict(True, Estimate(-0.2, 0.1001, ())) == "not resolved"


def test_figures_are_equal_within_two_standard_errors_that_would_show_the_effect() -> None:
    assert equal(Estimate(0.019, 0.01, ()), effect=0.02) == "reproduced"
    assert equal(Estimate(-0.021, 0.01, ()), effect=0.02) == "not reproduced"
    assert equal(Estimate(0.0, 0.0101, ()), effect=0.02) == "not resolved"
    assert equal(Estimate(0.0, math.nan, ()), effect=0.02) == "not resolved"


def test_a_figure_within_bounds_must_be_two_standard_errors_from_the_nearer_one() -> None:
    assert within(Estimate(-0.6, 0.099, ()), -1.1, -0.4) == "reproduced"
    assert within(Estimate(-0.6, 0.101, ()), -1.1, -0.4) == "not resolved"
    assert within(Estimate(-0.1, 0.1, ()), -1.1, -0.4) == "not reproduced"
    assert within(Estimate(5.0, 2.0, ()), 0.5, math.inf) == "reproduced"
