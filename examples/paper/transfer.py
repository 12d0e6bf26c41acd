"""Does the best learning rate stay when the width grows, without a change of anything else? Who transfers?

Four kinds of runs: `none` (no multipliers), `free` (row and column multipliers, arXiv 2601.04890), `fixed` (matrices of
constant norm with row and column gains, arXiv 2606.25971), and `mup` (no multipliers, and muP's constants and rates
relative to hidden size 64). Each has hidden sizes 64, 128 and 256, with heads of 32 and the other widths in proportion,
and five learning rates, f times the setting's, with weight decay divided by f, so that time constants stay: f is 1/4
to 4, and 1/8 to 2 for `fixed`, because its constant norm is about half of the equilibrium norm of the others, and the
same relative step has half of the rate.

The best rate of a kind at a width is the minimum of the parabola through the lowest valid loss and its two neighbours,
over ln f, after a mean over the seeds. If the lowest loss is at an end of the range, or beside a run that diverged,
there is no such figure, and the claim is not resolved. The standard error of the best rate comes from the noise of a
single loss: 0.031 nats by AdamW and 0.010 by Muon, which is the standard deviation of the headline's paired differences
over its three seeds, divided by the square root of 2 (results/r1.md).

Claims, for each optimizer. The threshold is a factor of 2: it is the middle, on a logarithmic scale, between a rate
that stays and one that falls as 1 / width, which theory says of AdamW without muP, and which is a factor of 4 here.

- free, fixed and mup: the best rates at hidden sizes 64 and 256 differ by less than a factor of 2.
- none: the best rate at 256 is below half of that at 64.

Reported: for each kind, the regret, which is the valid loss at 256 with the f that was the best at 64, minus that with
the best f at 256, both of the five; and the best f at each width, interpolated.

Runs: 55 by AdamW with one seed (at hidden size 64, `mup` is `none`), of about 1.5, 3 and 8 core-minutes by width, where
a run of R1 takes 4: 4 core-hours. --full adds Muon and takes all seeds (with --seeds 1 only one): 110 runs and 8
core-hours for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.arms import NAMES, OPTIMIZERS, at_rate, sizes_at
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, paired, within
from examples.paper.setting import Setting

WIDTHS = (64, 128, 256)
BASE, WIDEST = WIDTHS[0], WIDTHS[-1]
FACTORS: dict[str, tuple[float, ...]] = {
    "none": (0.25, 0.5, 1.0, 2.0, 4.0),
    "free": (0.25, 0.5, 1.0, 2.0, 4.0),
    "fixed": (0.125, 0.25, 0.5, 1.0, 2.0),
    "mup": (0.25, 0.5, 1.0, 2.0, 4.0),
}
"""Factors of the setting's learning rate by kind, each twice the one before."""
BOUND = math.log(2)
"""Largest |change| of ln lr with which a rate transfers."""
NOISE = {"adamw": 0.031, "muon": 0.010}
"""Standard deviation of a run's valid loss, in nats, by optimizer."""


def arm(setting: Setting, optimizer: str, kind: str, width: int, factor: float) -> Arm:
    """Return the runs of one kind at one width and one learning rate. They keep no checkpoints, which nobody reads."""
    keys = at_rate(setting, optimizer, kind, factor, BASE, sizes_at(width))
    return Arm(f"{optimizer}, {kind}, hidden {width}, lr x {factor:g}", {**keys, "checkpoint.keep_every": 0})


def losses(results: Results, optimizer: str, kind: str, width: int) -> dict[float, float]:
    """Return the valid loss by factor, mean over the seeds; infinity if one of them diverged."""
    return {
        factor: float(
            np.mean(
                [results.loss(arm(results.setting, optimizer, kind, width, factor), seed) for seed in results.seeds]
            )
        )
        for factor in FACTORS[kind]
    }


def lowest(found: Mapping[float, float]) -> float:
    """Return the factor with the lowest loss."""
    return min(found, key=lambda factor: found[factor])


def optimum(found: Mapping[float, float], noise: float) -> Estimate | None:
    """Return ln of the best factor: the minimum of the parabola through the lowest loss and its two neighbours.

    Args:
        found: loss by factor; each factor is twice the one before.
        noise: standard deviation of each loss, from which the standard error follows to first order.

    Returns:
        The estimate, or None if the lowest loss is at an end of the range or beside a loss that is not finite.
    """
    factors = list(found)
    middle = factors.index(lowest(found))
    if middle in (0, len(factors) - 1):
        return None
    left, low, right = (found[factor] for factor in factors[middle - 1 : middle + 2])
    if not math.isfinite(left + low + right):
        return None
    # The first of equal losses counts as the lowest, so left > low, and bend > 0.
    bend, tilt = left - 2 * low + right, left - right
    half = math.log(2) / 2
    # Derivatives of half * tilt / bend with respect to left, low and right.
    slopes = half * np.asarray([bend - tilt, 2 * tilt, -bend - tilt]) / bend**2
    return Estimate(math.log(factors[middle]) + half * tilt / bend, noise * float(np.linalg.norm(slopes)), ())


def best(results: Results, optimizer: str, kind: str, width: int) -> Estimate | None:
    """Return ln of the best factor at a width (:func:`optimum`)."""
    noise = NOISE[optimizer] / math.sqrt(len(results.seeds))
    return optimum(losses(results, optimizer, kind, width), noise)


def shown(found: Estimate | None) -> str:
    """Return a best factor in words."""
    if found is None:
        return "none in the range"
    low, middle, high = (math.exp(found.mean + sign * min(found.error, 9.9)) for sign in (-1, 0, 1))
    return f"lr x {middle:.2f} ({low:.2f} to {high:.2f})"


def change(results: Results, optimizer: str, kind: str) -> Measurement:
    """Measure the change of ln of the best learning rate from the smallest to the largest width."""
    first, last = (best(results, optimizer, kind, width) for width in (BASE, WIDEST))
    note = f"hidden {BASE}: {shown(first)}, {WIDEST}: {shown(last)}"
    if first is None or last is None:
        return Measurement(None, "not resolved", note)
    moved = Estimate(last.mean - first.mean, math.hypot(first.error, last.error), ())
    bounds = (-math.inf, -BOUND) if kind == "none" else (-BOUND, BOUND)
    return Measurement(moved, within(moved, *bounds), f"a factor of {math.exp(moved.mean):.2f}; {note}", "of ln lr")


def regret(results: Results, optimizer: str, kind: str) -> Measurement:
    """Report what it costs at the largest width to take the factor that was the best at the smallest."""
    taken, own = (lowest(losses(results, optimizer, kind, width)) for width in (BASE, WIDEST))
    at_own, at_taken = (results.valid(arm(results.setting, optimizer, kind, WIDEST, factor)) for factor in (own, taken))
    bests = ", ".join(f"{width}: {shown(best(results, optimizer, kind, width))}" for width in WIDTHS)
    note = f"lr x {taken:g} instead of x {own:g}; best at {bests}"
    return Measurement(paired(at_own, at_taken), "reported", note, "nats")


def _claims(optimizer: str, kind: str) -> tuple[Claim, Claim]:
    name, full = f"{NAMES[optimizer]}, {kind}", "" if optimizer == "adamw" else " (--full)"
    return (
        Claim(
            f"{name}: the best learning rate {'falls' if kind == 'none' else 'stays'} from hidden size {BASE} to "
            f"{WIDEST}{full}",
            f"change of ln lr < -{BOUND:.3f}" if kind == "none" else f"|change of ln lr| < {BOUND:.3f}",
            lambda results: change(results, optimizer, kind),
        ),
        Claim(
            f"{name}: regret at {WIDEST} of the best rate at {BASE}{full}",
            "none",
            lambda results: regret(results, optimizer, kind),
        ),
    )


def plot(results: Results, file: Path) -> None:
    """Draw the valid loss over the learning rate: a row for each optimizer, a panel for each kind, a line for each
    width, and a cross at the best rate."""
    drawn = False
    with plots.figure(file, len(OPTIMIZERS), len(FACTORS), width=3.4, height=3.0) as panels:
        places = [(optimizer, kind) for optimizer in OPTIMIZERS for kind in FACTORS]
        for panel, (optimizer, kind) in zip(panels, places, strict=True):
            for width in WIDTHS:
                try:
                    found = losses(results, optimizer, kind, width)
                except NotRun:
                    continue
                drawn = True
                (line,) = panel.plot(list(found), list(found.values()), "o-", markersize=3, label=f"hidden {width}")
                top = best(results, optimizer, kind, width)
                if top is not None:
                    panel.plot([math.exp(top.mean)], [min(found.values())], "x", color=line.get_color(), markersize=9)
            panel.set(xscale="log", xlabel="learning rate / the setting's", ylabel="valid loss (nats)")
            panel.set_title(f"{NAMES[optimizer]}, {kind}")
            if panel.lines:
                panel.legend(fontsize=7)
        if not drawn:
            raise NotRun("no sweep is complete")


def _arms(setting: Setting, optimizer: str) -> list[Arm]:
    return [
        arm(setting, optimizer, kind, width, factor)
        for width in WIDTHS
        for kind, factors in FACTORS.items()
        for factor in factors
    ]


EXPERIMENT = Experiment(
    "transfer",
    "Learning rate over width",
    [claim for optimizer in OPTIMIZERS for kind in FACTORS for claim in _claims(optimizer, kind)],
    lambda setting: _arms(setting, "adamw"),
    plot,
    lambda setting: _arms(setting, "muon"),
    seeds=1,
    package=False,
    losses_only=True,
)
