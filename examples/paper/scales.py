"""Who should set a matrix's scale: free (learnable multipliers), fixed (a constant norm), or neither?

Four kinds of runs, by AdamW and by Muon: `none` (no multipliers: noise and weight decay set the norms), `free` (row
and column multipliers, arXiv 2601.04890), `fixed` (each matrix keeps the norm that it begins with, and row and column
gains are learned, arXiv 2606.25971), and `directions` (the same norm, and no gains). Each kind has three learning
rates, f times the setting's, with weight decay divided by f, so that time constants stay. Fixed matrices have no decay.

Claims, for each optimizer, at each kind's own best learning rate (the lowest mean valid loss over seeds), paired by
seed:

- free - none < -2 standard errors (the paper: multipliers improve a tuned baseline).
- fixed - none < -2 standard errors (the rival: so does a fixed norm with gains).

Reported: free - fixed, directions - none, and the gain of free over none beside that of Muon over AdamW, both at their
best. A best rate at an end of the range is marked: the optimum may lie outside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.arms import NAMES, OPTIMIZERS
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, estimate, paired, verdict
from examples.paper.setting import Setting

FACTORS = (0.5, 1.0, 2.0)
"""Factors of the setting's learning rate."""
ERRORS = 2.0
"""Number of standard errors by which a kind must be better than `none`."""

KINDS = {
    "none": {"multipliers.implementation": "none"},
    "free": {},
    "fixed": {"multipliers.norm": "fixed"},
    "directions": {"multipliers.implementation": "none", "multipliers.norm": "fixed"},
}
"""Keys of each kind."""


def arm(setting: Setting, optimizer: str, kind: str, factor: float) -> Arm:
    """Return the runs of one kind at one learning rate."""
    lr, weight_decay = setting.rates[optimizer]
    return Arm(
        f"{optimizer}, {kind}, lr x {factor:g}",
        {
            "optimizer.name": optimizer,
            "optimizer.lr": lr * factor,
            "optimizer.weight_decay": weight_decay / factor,
            **KINDS[kind],
        },
    )


def best(results: Results, optimizer: str, kind: str) -> tuple[float, list[float]]:
    """Return the factor with the lowest mean valid loss, and its losses, seed by seed."""
    losses = {factor: results.valid(arm(results.setting, optimizer, kind, factor)) for factor in FACTORS}
    factor = min(losses, key=lambda each: float(np.mean(losses[each])))
    return factor, losses[factor]


def shown(factor: float) -> str:
    """Return a factor in words, marked if it is at an end of the range."""
    return f"lr x {factor:g}{' (end of the range)' if factor in (FACTORS[0], FACTORS[-1]) else ''}"


def compare(results: Results, optimizer: str, kind: str, other: str, claimed: bool) -> Measurement:
    """Measure the paired difference of two kinds, each at its best learning rate."""
    (factor, losses), (other_factor, other_losses) = (best(results, optimizer, each) for each in (kind, other))
    gap = paired(other_losses, losses)
    note = (
        f"{kind} {np.mean(losses):.4f} at {shown(factor)}, {other} {np.mean(other_losses):.4f} at {shown(other_factor)}"
    )
    return Measurement(gap, verdict(gap.mean < -ERRORS * gap.error, gap) if claimed else "reported", note, "nats")


def against_muon(results: Results) -> Measurement:
    """Measure the gain of free over none by AdamW as a part of Muon's gain over AdamW, both without multipliers."""
    plain, free, muon = (
        best(results, optimizer, kind)[1]
        for optimizer, kind in (("adamw", "none"), ("adamw", "free"), ("muon", "none"))
    )
    ratio = estimate([(b - a) / (c - a) for a, b, c in zip(plain, free, muon, strict=True)])
    gains: list[Estimate] = [paired(plain, free), paired(plain, muon)]
    return Measurement(ratio, "reported", f"free {gains[0].mean:+.4f}, Muon {gains[1].mean:+.4f} nats")


def _claims(optimizer: str) -> list[Claim]:
    name, threshold = NAMES[optimizer], f"paired difference of the valid loss < -{ERRORS:g} SE"
    return [
        Claim(
            f"{name}: free is better than none",
            threshold,
            lambda results: compare(results, optimizer, "free", "none", True),
        ),
        Claim(
            f"{name}: fixed is better than none",
            threshold,
            lambda results: compare(results, optimizer, "fixed", "none", True),
        ),
        Claim(
            f"{name}: free against fixed", "none", lambda results: compare(results, optimizer, "free", "fixed", False)
        ),
        Claim(
            f"{name}: directions against none",
            "none",
            lambda results: compare(results, optimizer, "directions", "none", False),
        ),
    ]


def plot(results: Results, file: Path) -> None:
    """Draw the valid loss over the learning rate: one panel for each optimizer, one line for each kind."""
    drawn = False
    with plots.figure(file, 1, 2) as panels:
        for panel, optimizer in zip(panels, OPTIMIZERS, strict=True):
            for kind in KINDS:
                points: dict[float, list[float]] = {}
                for factor in FACTORS:
                    try:
                        points[factor] = results.valid(arm(results.setting, optimizer, kind, factor))
                    except NotRun:
                        continue
                if points:
                    drawn = True
                    (line,) = panel.plot(list(points), [np.mean(values) for values in points.values()], label=kind)
                    for factor, values in points.items():
                        panel.scatter([factor] * len(values), values, color=line.get_color(), s=12)
            panel.set(xscale="log", xlabel="learning rate / the setting's", ylabel="valid loss (nats)")
            panel.set_title(NAMES[optimizer])
        if not drawn:
            raise NotRun("no arm is complete")
        panels[0].legend()


EXPERIMENT = Experiment(
    "scales",
    "Free, fixed, neither",
    [
        *(claim for optimizer in OPTIMIZERS for claim in _claims(optimizer)),
        Claim("The gain of free over none, as a part of Muon's over AdamW", "none", against_muon),
    ],
    lambda setting: [arm(setting, name, kind, f) for name in OPTIMIZERS for kind in KINDS for f in FACTORS],
    plot,
    package=False,
)
