"""E1: the LM head's norm follows the hyperparameters, and a multiplier of its columns makes up for it (Fig. 1, top).

Paper: the head's learning rate and weight decay are changed by S and 1 / S, so that their product stays and the
equilibrium norm sqrt(lr / wd) is S times as large. If the final norm has no weights (frozen), the loss is clearly worse
at the extremes. With one weight (scalar) or one per feature (vector), which act as multipliers of the head's columns,
the loss stays flat, because the weights fall as the norm grows.

Claims, without other multipliers, by AdamW, from valid losses after the last step, paired by seed:

- frozen: loss(8) - loss(1) > 3 standard errors, and more than 3 times the same for scalar and for vector.
- scalar and vector: the slope of ln RMS(W_head) over ln S is in [0.85, 1.15], for S from 1/4 to 8.
- scalar and vector: the slope of ln mean |weight of the final norm| over ln S is in [-1.15, -0.7], for the same S.

Norms are read at the end of the constant stage. The final norm's learning rate is 2e-2, so that its weights can reach 8
within the run, and there is no z-loss. frozen at S = 1/8 against S = 1 is reported.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.matrices import root_mean_squares
from examples.paper.paired import Estimate, estimate, paired, slope, verdict, within
from examples.paper.setting import Setting

ENDS = (1 / 8, 1.0, 8.0)
"""Values of S in the package."""
SWEEP = (1 / 4, 1.0, 4.0, 8.0)
"""Values of S over which slopes are fitted."""
KINDS = ("frozen", "scalar", "vector")
LEARNED = ("scalar", "vector")

ERRORS = 3.0
"""Number of standard errors by which frozen must be worse at S = 8."""
RATIO = 3.0
"""Factor by which frozen's loss must rise more than that of the learned kinds."""
NORM_SLOPES = (0.85, 1.15)
WEIGHT_SLOPES = (-1.15, -0.7)

FINAL_NORM_LR = 2e-2


def arm(setting: Setting, kind: str, s: float) -> Arm:
    """Return the runs with one kind of final norm, and the head's learning rate and decay changed by S and 1 / S."""
    lr_factors = {"head": s}
    if kind != "frozen":
        lr_factors["final_norm"] = FINAL_NORM_LR / setting.rates["adamw"][0]
    return Arm(
        f"final norm {kind}, S = {s:g}",
        {
            "optimizer.name": "adamw",
            "multipliers.implementation": "none",
            "model.final_norm": kind,
            "model.z_loss": 0.0,
            "optimizer.lr_factors": lr_factors,
            "optimizer.weight_decay_factors": {"head": 1 / s},
        },
    )


def rise(results: Results, kind: str, s: float) -> Estimate:
    """Return the paired difference of the valid loss, at S minus at 1."""
    return paired(results.valid(arm(results.setting, kind, 1.0)), results.valid(arm(results.setting, kind, s)))


def loses(results: Results) -> Measurement:
    """Measure how much more frozen loses at S = 8 than scalar and vector."""
    frozen, others = rise(results, "frozen", 8.0), {kind: rise(results, kind, 8.0) for kind in LEARNED}
    holds = frozen.mean > ERRORS * frozen.error and all(frozen.mean > RATIO * other.mean for other in others.values())
    note = ", ".join(f"{kind} {other.mean:+.4f}" for kind, other in others.items())
    return Measurement(frozen, verdict(holds, frozen), note, "nats")


def head_norm(results: Results, kind: str, s: float, seed: int) -> float:
    """Return the RMS of W_head at the end of the constant stage."""
    saved = results.checkpoint(arm(results.setting, kind, s), seed, results.setting.constant_end)
    return root_mean_squares(saved)["head"]


def final_weight(results: Results, kind: str, s: float, seed: int) -> float:
    """Return the mean absolute weight of the final norm at the end of the constant stage."""
    saved = results.checkpoint(arm(results.setting, kind, s), seed, results.setting.constant_end)
    return float(saved.read("model.decoder.final_layernorm.weight").double().abs().mean())


def follows(results: Results, kind: str, of_norm: bool) -> Measurement:
    """Measure the slope of a norm over S, seed by seed."""
    read, (low, high) = (head_norm, NORM_SLOPES) if of_norm else (final_weight, WEIGHT_SLOPES)
    slopes = estimate(
        [
            slope([math.log(s) for s in SWEEP], [math.log(read(results, kind, s, seed)) for s in SWEEP]).value
            for seed in results.seeds
        ]
    )
    return Measurement(slopes, within(slopes, low, high), f"of each seed: {_listed(slopes.values)}")


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _slope_claims(kind: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            f"{kind}: the head's norm follows sqrt(lr / wd) (--full)",
            f"slope of ln RMS(W) over ln S in [{NORM_SLOPES[0]}, {NORM_SLOPES[1]}]",
            lambda results: follows(results, kind, True),
        ),
        Claim(
            f"{kind}: the final norm's weights make up for it (--full)",
            f"slope of ln mean |weight| over ln S in [{WEIGHT_SLOPES[0]}, {WEIGHT_SLOPES[1]}]",
            lambda results: follows(results, kind, False),
        ),
    )


CLAIMS = (
    Claim(
        "Without weights of the final norm the loss suffers at S = 8, and with them much less",
        f"frozen: loss(8) - loss(1) > {ERRORS:g} SE, and > {RATIO:g} times that of scalar and vector",
        loses,
    ),
    *(claim for kind in LEARNED for claim in _slope_claims(kind)),
    Claim(
        "frozen at S = 1/8, against S = 1",
        "none",
        lambda results: Measurement(rise(results, "frozen", 1 / 8), "reported", unit="nats"),
    ),
)


def plot(results: Results, file: Path) -> None:
    """Draw loss, norm of the head and weight of the final norm over S; one line for each kind, points for all seeds."""
    swept = sorted({*ENDS, *SWEEP})
    with plots.figure(file, 1, 3) as (losses, norms, weights):
        drawn = False
        for kind in KINDS:
            for panel, read in ((losses, None), (norms, head_norm), (weights, final_weight)):
                if read is final_weight and kind == "frozen":
                    continue
                points: dict[float, list[float]] = {}
                for s in swept:
                    try:
                        points[s] = (
                            results.valid(arm(results.setting, kind, s))
                            if read is None
                            else [read(results, kind, s, seed) for seed in results.seeds]
                        )
                    except NotRun:
                        continue
                if points:
                    drawn = True
                    (line,) = panel.plot(list(points), [np.mean(values) for values in points.values()], label=kind)
                    for s, values in points.items():
                        panel.scatter([s] * len(values), values, color=line.get_color(), s=12)
        if not drawn:
            raise NotRun("no arm is complete")
        for panel, label in ((losses, "valid loss (nats)"), (norms, "RMS of W_head"), (weights, "mean |final norm|")):
            panel.set(xscale="log", xlabel="S", ylabel=label)
            if panel is not losses:
                panel.set_yscale("log")
        losses.legend()


EXPERIMENT = Experiment(
    "E1",
    "The head's scale",
    CLAIMS,
    lambda setting: [arm(setting, kind, s) for kind in KINDS for s in ENDS],
    plot,
    lambda setting: [arm(setting, kind, s) for kind in KINDS for s in SWEEP],
    seeds=2,
)
