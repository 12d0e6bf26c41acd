"""Statistics of the experiments: paired differences, slopes, rank correlation, spread, and the verdict. Pure.

Runs of the same seed have the same initial weights and the same order of the data, so that most of the noise cancels in
their difference. One seed gives one difference, and the standard error is taken over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["reproduced", "not reproduced", "not resolved", "not run", "reported"]
"""`reported` is the verdict of a figure for which the paper claims nothing."""

LAST_STEPS = 100
"""Number of steps at the end of a run over which its training loss is averaged."""
BLOCK_STEPS = 10
"""Number of consecutive steps that count as one value when the error is taken over the order of the data."""
EQUAL_ERRORS = 2.0
"""Number of standard errors within which two figures count as equal."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    error: float
    """Standard error, or NaN if there is only one value."""
    values: tuple[float, ...]
    """Values that the mean is over, one for each seed."""


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and standard error, s / sqrt(n) with the sample deviation s, of values of different seeds."""
    given = np.asarray(values, dtype=np.float64)
    error = float(given.std(ddof=1)) / math.sqrt(len(given)) if len(given) > 1 else math.nan
    return Estimate(float(given.mean()), error, tuple(float(value) for value in given))


def paired(without: Sequence[float], with_it: Sequence[float]) -> Estimate:
    """Return the mean difference `with_it` - `without`; values at the same position are of the same seed."""
    return estimate([b - a for a, b in zip(without, with_it, strict=True)])


def mean_of_last(losses: Mapping[int, float], count: int = LAST_STEPS) -> float:
    """Return the mean training loss over the last `count` steps, or over all steps if there are fewer."""
    return float(np.mean([losses[step] for step in sorted(losses)[-count:]]))


def over_steps(values: Sequence[float], block: int = BLOCK_STEPS) -> Estimate:
    """Return the mean of one run's values at consecutive steps, with its standard error over the order of the data.

    The error is from the means of blocks of `block` steps, because values of neighbouring steps are correlated. It says
    nothing about other initial weights. Values before the first whole block, counted from the end, are left out.

    Raises:
        ValueError: there are fewer than two blocks.
    """
    blocks = len(values) // block
    if blocks < 2:
        raise ValueError(f"{len(values)} steps make {blocks} blocks of {block}: an error needs at least 2")
    of_blocks = estimate(np.asarray(values[-blocks * block :]).reshape(blocks, block).mean(axis=1).tolist())
    return Estimate(of_blocks.mean, of_blocks.error, (of_blocks.mean,))


def paired_over_steps(
    without: Mapping[int, float],
    with_it: Mapping[int, float],
    count: int = LAST_STEPS,
    block: int = BLOCK_STEPS,
) -> Estimate:
    """Return the mean difference of the training loss over the last `count` steps of two runs of the same seed, with
    the error of :func:`over_steps`.

    Raises:
        ValueError: the two runs have different steps, or fewer than two blocks.
    """
    if without.keys() != with_it.keys():
        raise ValueError("the two runs have different steps: compare runs of the same length")
    return over_steps([with_it[step] - without[step] for step in sorted(without)[-count:]], block)


def over_seeds(values: Sequence[Sequence[float]], within: Callable[[Sequence[float]], Estimate] = estimate) -> Estimate:
    """Return the mean over seeds of each seed's mean value.

    Args:
        values: values [seed][layer or step].
        within: function that estimates the mean of the values of one seed. If there is only one, the standard error is
            this function's: over layers by :func:`estimate`, over steps by :func:`over_steps`. It then says nothing
            about other initial weights.
    """
    if len(values) > 1:
        return estimate([float(np.mean(each)) for each in values])
    found = within(values[0])
    return Estimate(found.mean, found.error, (found.mean,))


@dataclass(frozen=True)
class Slope:
    """Slope of a straight line, with its standard error."""

    value: float
    error: float


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Fit y = a + b x by least squares, and return b with its standard error for independent residuals of equal spread.

    Raises:
        ValueError: there are fewer than three points, or all x are equal.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(across) < 3 or np.ptp(across) == 0:
        raise ValueError(f"a slope with an error needs at least 3 points at different x; x is {list(x)}")
    deviations = across - across.mean()
    squares = float(deviations @ deviations)
    b = float(deviations @ up) / squares
    residuals = up - up.mean() - b * deviations
    return Slope(b, math.sqrt(float(residuals @ residuals) / (len(across) - 2) / squares))


def exponent(x: Sequence[float], lines: Sequence[Sequence[float]]) -> Estimate:
    """Return b of y ~ x^b: the mean over seeds of the slope of ln y over ln x.

    Args:
        x: positive numbers, at least three.
        lines: positive y at each x, [seed][x]. If there is only one seed, the standard error is that of its fit, and
            says nothing about other initial weights.
    """
    logs = [math.log(value) for value in x]
    slopes = [slope(logs, [math.log(value) for value in line]) for line in lines]
    found = estimate([each.value for each in slopes])
    return found if len(lines) > 1 else Estimate(found.mean, slopes[0].error, found.values)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation. Equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(given, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each group of equal values, counted from 1
    return (last - (counts - 1) / 2)[inverse]


def coefficient_of_variation(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard deviation divided by the mean."""
    given = np.asarray(values, dtype=np.float64)
    return float(given.std() / given.mean())


def verdict(holds: bool, effect: Estimate) -> Verdict:
    """Return the verdict on a claim.

    Args:
        holds: whether the measured figures meet the claim's threshold.
        effect: how far the figure is from what it would be without the effect. For a claim that something stays within
            a bound, it is the distance to the bound.

    Returns:
        `not resolved` if the standard error is above half of the effect, or unknown. Otherwise `reproduced` or `not
        reproduced`.
    """
    if not effect.error <= abs(effect.mean) / 2:  # NaN is unknown
        return "not resolved"
    return "reproduced" if holds else "not reproduced"


def equal(gap: Estimate, effect: float) -> Verdict:
    """Return the verdict on the claim that a difference is 0: it is within :data:`EQUAL_ERRORS` standard errors.

    Args:
        gap: the difference.
        effect: a difference that the runs must be able to show. If it is below two standard errors, the claim is `not
            resolved`.
    """
    return verdict(abs(gap.mean) <= EQUAL_ERRORS * gap.error, Estimate(effect, gap.error, ()))


def within(found: Estimate, low: float, high: float) -> Verdict:
    """Return the verdict on the claim that a figure is between two bounds, of which one may be infinite."""
    distance = min(found.mean - low, high - found.mean)
    return verdict(distance > 0, Estimate(distance, found.error, ()))
