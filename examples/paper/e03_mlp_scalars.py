"""E3: MLP matrices whose norm is wrong, with and without a scalar for each (Fig. 1, bottom right; Figs. 8 and 9).

Paper: the norms of the layers have no weights. Learning rate and weight decay of gate, up and down are changed by S and
1 / S, which changes their equilibrium norm by S. Without multipliers the loss suffers at large S; with one scalar for
each of these matrices (learning rate 1e-2, no decay) it does not, with Adam and with Muon.

Claims, for each optimizer, from valid losses after the last step, paired by seed:

- without: loss(4) - loss(1) > 3 standard errors, and with scalars less than a third of it.
- with scalars: the slope of ln RMS(W) over ln S, mean of the three roles, is in [0.85, 1.15], for S from 1/4 to 4.
- with scalars: the slope of the mean over layers of ln(s_up s_gate s_down) over ln S is in [-3.3, -2], for the same S.

Norms and scalars are read at the end of the constant stage.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.arms import NAMES, OPTIMIZERS
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.matrices import matrices, root_mean_squares
from examples.paper.paired import Estimate, estimate, paired, slope, verdict, within

ROLES = ("gate", "up", "down")
ENDS = (1.0, 4.0)
"""Values of S in the package, by AdamW."""
SWEEP = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Values of S over which slopes are fitted."""
ERRORS = 3.0
"""Number of standard errors by which the loss without scalars must be worse at S = 4."""
PART = 1 / 3
"""Largest part of this loss that may remain with scalars."""
NORM_SLOPES = (0.85, 1.15)
SCALAR_SLOPES = (-3.3, -2.0)

SCALARS = {
    "multipliers.placement": dict.fromkeys(ROLES, "scalar"),
    "multipliers.lr": 1e-2,
    "multipliers.weight_decay": 0.0,
}
WITH = {False: {"multipliers.implementation": "none"}, True: SCALARS}
"""Keys of the runs without and with scalars."""


def arm(optimizer: str, with_scalars: bool, s: float) -> Arm:
    """Return the runs at one S."""
    return Arm(
        f"{optimizer}, MLP {'with scalars' if with_scalars else 'without'}, S = {s:g}",
        {
            "optimizer.name": optimizer,
            "model.norms": "frozen",
            "optimizer.lr_factors": dict.fromkeys(ROLES, s),
            "optimizer.weight_decay_factors": dict.fromkeys(ROLES, 1 / s),
            **WITH[with_scalars],
        },
    )


def rise(results: Results, optimizer: str, with_scalars: bool) -> Estimate:
    """Return the paired difference of the valid loss, at S = 4 minus at 1."""
    return paired(results.valid(arm(optimizer, with_scalars, 1.0)), results.valid(arm(optimizer, with_scalars, 4.0)))


def suffers(results: Results, optimizer: str) -> Measurement:
    """Measure how much the loss rises at S = 4 without scalars, and how much of it remains with them."""
    without, with_them = (rise(results, optimizer, scalars) for scalars in (False, True))
    holds = without.mean > ERRORS * without.error and with_them.mean < PART * without.mean
    return Measurement(without, verdict(holds, without), f"with scalars {with_them.mean:+.4f}", "nats")


def norm(results: Results, optimizer: str, s: float, seed: int) -> float:
    """Return the mean over the roles of ln RMS(W) at the end of the constant stage."""
    found = root_mean_squares(results.checkpoint(arm(optimizer, True, s), seed, results.setting.constant_end))
    return float(np.mean([math.log(found[role]) for role in ROLES]))


def product(results: Results, optimizer: str, s: float, seed: int) -> float:
    """Return the mean over layers of ln |s_up s_gate s_down| at the end of the constant stage."""
    saved = results.checkpoint(arm(optimizer, True, s), seed, results.setting.constant_end)
    logs = [math.log(abs(float(each.multipliers["scalar"]))) for each in matrices(saved) if each.role in ROLES]
    return len(ROLES) * float(np.mean(logs))


def follows(results: Results, optimizer: str, of_norm: bool) -> Measurement:
    """Measure the slope of a logarithm over ln S, seed by seed."""
    read, (low, high) = (norm, NORM_SLOPES) if of_norm else (product, SCALAR_SLOPES)
    slopes = estimate(
        [
            slope([math.log(s) for s in SWEEP], [read(results, optimizer, s, seed) for s in SWEEP]).value
            for seed in results.seeds
        ]
    )
    return Measurement(slopes, within(slopes, low, high))


def _claims(optimizer: str) -> list[Claim]:
    name, full = NAMES[optimizer], "" if optimizer == "adamw" else " (--full)"
    return [
        Claim(
            f"{name}: large norms of the MLP cost loss, and scalars make up for it{full}",
            f"without: loss(4) - loss(1) > {ERRORS:g} SE; with scalars < 1/3 of it",
            lambda results: suffers(results, optimizer),
        ),
        Claim(
            f"{name}, with scalars: norms follow sqrt(lr / wd) (--full)",
            f"slope of ln RMS(W) over ln S in [{NORM_SLOPES[0]}, {NORM_SLOPES[1]}]",
            lambda results: follows(results, optimizer, True),
        ),
        Claim(
            f"{name}, with scalars: their product falls as the norms rise (--full)",
            f"slope of ln(s_up s_gate s_down) over ln S in [{SCALAR_SLOPES[0]}, {SCALAR_SLOPES[1]}]",
            lambda results: follows(results, optimizer, False),
        ),
    ]


def plot(results: Results, file: Path) -> None:
    """Draw the valid loss over S: four lines, a dot for each seed."""
    with plots.figure(file, 1, 1, width=6.0) as (panel,):
        drawn = False
        for optimizer in OPTIMIZERS:
            for with_scalars in (False, True):
                points: dict[float, list[float]] = {}
                for s in SWEEP:
                    try:
                        points[s] = results.valid(arm(optimizer, with_scalars, s))
                    except NotRun:
                        continue
                if points:
                    drawn = True
                    label = f"{NAMES[optimizer]}, {'with scalars' if with_scalars else 'without'}"
                    (line,) = panel.plot(list(points), [np.mean(values) for values in points.values()], label=label)
                    for s, values in points.items():
                        panel.scatter([s] * len(values), values, color=line.get_color(), s=12)
        if not drawn:
            raise NotRun("no arm is complete")
        panel.set(xscale="log", xlabel="S", ylabel="valid loss (nats)")
        panel.legend()


def _arms(optimizers: tuple[str, ...], swept: tuple[float, ...]) -> list[Arm]:
    return [arm(name, with_scalars, s) for name in optimizers for with_scalars in (False, True) for s in swept]


EXPERIMENT = Experiment(
    "E3",
    "Scalars of the MLP",
    [claim for optimizer in OPTIMIZERS for claim in _claims(optimizer)],
    lambda setting: _arms(("adamw",), ENDS),
    plot,
    lambda setting: _arms(OPTIMIZERS, SWEEP),
    seeds=2,
)
