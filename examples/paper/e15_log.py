"""E15: multipliers as r = exp(u), with AdamW on u (section 2: at most a slight gain, and less stable).

Claims, by AdamW, from valid losses after the last step, paired by seed:

- with multipliers everywhere: |log - direct| < 2 standard errors. One standard error must be at most 0.02 nats (0.4 %
  of the loss, the size of the effect of multipliers), or the claim is not resolved. Multipliers against none had 0.026
  with three seeds, so it may take more.
- in E1's setting at S = 1/8 (an eighth of the head's learning rate, eight times its decay), with a frozen final norm,
  no z-loss, and one multiplier of the head at the global learning rate: log - direct < -3 standard errors. Direct, 480
  steps at 4e-3 bring the multiplier from 1 to 3 at most; with log, to 7. A gain shows that log needs no learning rate
  of its own where a scale must travel far.

Reported: the same at S = 1/8 against the frozen final norm without a multiplier.
"""

from __future__ import annotations

from pathlib import Path

from examples.paper import e01_projector, plots
from examples.paper.arms import ALL
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import EQUAL_ERRORS, Estimate, equal, verdict
from examples.paper.setting import Setting

LARGEST_ERROR = 0.02
"""Standard error in nats above which equality is not resolved."""
GAIN_ERRORS = 3.0
"""Number of standard errors by which log must be better at S = 1/8."""
S = 1 / 8

LOG = Arm("adamw, all, log", {**ALL["adamw"].overrides, "multipliers.parametrization": "log"})


def small_head(setting: Setting, parametrization: str) -> Arm:
    """Return the runs at S = 1/8 with a multiplier of the head."""
    frozen = e01_projector.arm(setting, "frozen", S)
    return Arm(
        f"S = {S:g}, multiplier of the head, {parametrization}",
        {
            **frozen.overrides,
            "multipliers.implementation": "layer",
            "multipliers.placement": {"head": "scalar"},
            "multipliers.parametrization": parametrization,
        },
    )


def as_good(results: Results) -> Measurement:
    """Measure log - direct with multipliers everywhere."""
    gap = results.gap("valid", ALL["adamw"], LOG)
    return Measurement(gap, equal(gap, EQUAL_ERRORS * LARGEST_ERROR), unit="nats")


def travels(results: Results) -> Measurement:
    """Measure log - direct at S = 1/8."""
    gap = results.gap("valid", *(small_head(results.setting, name) for name in ("direct", "log")))
    return Measurement(gap, verdict(gap.mean < -GAIN_ERRORS * gap.error, gap), unit="nats")


def against_frozen(results: Results) -> Measurement:
    """Report log - frozen at S = 1/8."""
    frozen = e01_projector.arm(results.setting, "frozen", S)
    return Measurement(results.gap("valid", frozen, small_head(results.setting, "log")), "reported", unit="nats")


CLAIMS = (
    Claim(
        "Log-parametrization is as good as direct",
        f"|paired difference of the valid loss| < {EQUAL_ERRORS:g} SE, SE < {LARGEST_ERROR:g}",
        as_good,
    ),
    Claim(
        "At S = 1/8 the head's multiplier does more with log, at the global learning rate",
        f"paired difference of the valid loss < -{GAIN_ERRORS:g} SE",
        travels,
    ),
    Claim("At S = 1/8, log against no multiplier", "none", against_frozen),
)


def plot(results: Results, file: Path) -> None:
    """Draw both paired differences: a dot for each seed, mean and one standard error."""
    gaps: dict[str, Estimate] = {}
    for name, measure in (("all: log - direct", as_good), ("S = 1/8: log - direct", travels)):
        try:
            measured = measure(results).estimate
        except NotRun:
            continue
        if measured is not None:
            gaps[name] = measured
    plots.differences(file, gaps, "difference of the valid loss (nats)")


EXPERIMENT = Experiment(
    "E15",
    "Multipliers as exponentials",
    CLAIMS,
    lambda setting: [
        ALL["adamw"],
        LOG,
        *(small_head(setting, name) for name in ("direct", "log")),
        e01_projector.arm(setting, "frozen", S),
    ],
    plot,
    package=False,
    losses_only=True,
)
