"""Who should set a matrix's scale: learnable multipliers (free), a constant norm (fixed), constants (muP), or nobody?

Five kinds of runs, by AdamW and by Muon: `none` (no multipliers: noise and weight decay set the norms), `free` (row and
column multipliers, arXiv 2601.04890), `fixed` (each matrix keeps the norm that it begins with, and row and column gains
are learned, arXiv 2606.25971), `directions` (the same norm, and no gains), and `mup` (no multipliers, and muP's
constants relative to half of the width). Each kind has four learning rates, f times the setting's, with weight decay
divided by f, so that time constants stay. muP's f are twice those of the others, because its rates in the blocks are
0.5 (AdamW) and 0.71 (Muon) times the global one. Fixed matrices have no decay. The rate with the lowest valid loss with
the first seed is a kind's best one, and is run with all seeds.

The lowest f, 1/4 (1/2 for muP), was added for all kinds on 27 November 2026, after the first seeds of `none` and `free`
by AdamW had their lowest losses at 1/2, then the end of the range. No seed that the claims compare had been run at a
kind's best rate, other than the first ones.

Claims, for each optimizer, at each kind's own best learning rate, paired by seed:

- free - none < -2 standard errors (the paper: multipliers improve a tuned baseline).
- free - mup < -2 standard errors (the same, and the baseline has tuned scales).
- fixed - none < -2 standard errors (the rival: so does a fixed norm with gains).

Reported: free - fixed, directions - none, and the gain of free over none beside that of Muon over AdamW, both at their
best. A best rate at an end of the range is marked: the optimum may lie outside.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.arms import KINDS, NAMES, OPTIMIZERS, at_rate, model_of
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, estimate, paired, verdict
from examples.paper.setting import Setting

FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Factors of the setting's learning rate."""
MUP_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Those of muP, which halves the learning rate of the blocks' matrices (AdamW)."""
WIDER = 2
"""Width of the setting's model divided by the width at which muP's factors are 1."""
ERRORS = 2.0
"""Number of standard errors by which a kind must be better than `none`."""


def arm(setting: Setting, optimizer: str, kind: str, factor: float) -> Arm:
    """Return the runs of one kind at one learning rate."""
    base = model_of(setting, {}).hidden_size // WIDER
    return Arm(f"{optimizer}, {kind}, lr x {factor:g}", at_rate(setting, optimizer, kind, factor, base, {}))


def swept(setting: Setting, optimizer: str, kind: str) -> dict[float, Arm]:
    """Return the arms of one kind by the factor of their learning rate."""
    factors = MUP_FACTORS if kind == "mup" else FACTORS
    return {factor: arm(setting, optimizer, kind, factor) for factor in factors}


def best(results: Results, optimizer: str, kind: str) -> tuple[float, Arm]:
    """Return the factor and the arm of the best learning rate."""
    arms = swept(results.setting, optimizer, kind)
    factor = min(arms, key=lambda each: results.first_loss(arms[each]))
    return factor, arms[factor]


def shown(kind: str, factor: float) -> str:
    """Return a factor in words, marked if it is at an end of the range."""
    factors = MUP_FACTORS if kind == "mup" else FACTORS
    return f"lr x {factor:g}{' (end of the range)' if factor in (factors[0], factors[-1]) else ''}"


def compare(results: Results, optimizer: str, kind: str, other: str, claimed: bool) -> Measurement:
    """Measure the paired difference of two kinds, each at its best learning rate."""
    notes, losses = [], []
    for each in (kind, other):
        factor, chosen = best(results, optimizer, each)
        losses.append(results.valid(chosen))
        notes.append(f"{each} {np.mean(losses[-1]):.4f} at {shown(each, factor)}")
    gap, note = paired(losses[1], losses[0]), ", ".join(notes)
    return Measurement(gap, verdict(gap.mean < -ERRORS * gap.error, gap) if claimed else "reported", note, "nats")


def against_muon(results: Results) -> Measurement:
    """Measure the gain of free over none by AdamW as a part of Muon's gain over AdamW, both without multipliers."""
    plain, free, muon = (
        results.valid(best(results, optimizer, kind)[1])
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
            f"{name}: free is better than muP",
            threshold,
            lambda results: compare(results, optimizer, "free", "mup", True),
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
    """Draw the valid loss over the learning rate: one panel for each optimizer, one line for each kind, of the first
    seed. Dots are the seeds of the best rate."""
    drawn = False
    with plots.figure(file, 1, 2) as panels:
        for panel, optimizer in zip(panels, OPTIMIZERS, strict=True):
            for kind in KINDS:
                points: dict[float, float] = {}
                for factor, each in swept(results.setting, optimizer, kind).items():
                    with contextlib.suppress(NotRun):
                        points[factor] = results.first_seeds(1).valid(each)[0]
                if not points:
                    continue
                drawn = True
                (line,) = panel.plot(list(points), list(points.values()), label=kind)
                with contextlib.suppress(NotRun):
                    factor, chosen = best(results, optimizer, kind)
                    losses = results.valid(chosen)
                    panel.scatter([factor] * len(losses), losses, color=line.get_color(), s=12)
            panel.set(xscale="log", xlabel="learning rate / the setting's", ylabel="valid loss (nats)")
            panel.set_title(NAMES[optimizer])
        if not drawn:
            raise NotRun("no arm is complete")
        panels[0].legend()


def _arms(setting: Setting) -> list[Arm]:
    return [each for name in OPTIMIZERS for kind in KINDS for each in swept(setting, name, kind).values()]


def _best_arms(results: Results) -> list[Arm]:
    """Return the best arm of each kind, by optimizer, as far as the runs with the first seed are complete."""
    found = []
    for name in OPTIMIZERS:
        for kind in KINDS:
            with contextlib.suppress(NotRun):
                found.append(best(results, name, kind)[1])
    return found


EXPERIMENT = Experiment(
    "scales",
    "Free, fixed, constants, nobody",
    [
        *(claim for optimizer in OPTIMIZERS for claim in _claims(optimizer)),
        Claim("The gain of free over none, as a part of Muon's over AdamW", "none", against_muon),
    ],
    _arms,
    plot,
    decided=_best_arms,
    seeds=1,
    package=False,
    losses_only=True,
)
