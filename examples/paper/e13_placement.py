"""E13: where the multipliers are (sections 4.1 and 4.4, appendix C).

Paper: multipliers on both sides of every matrix are slightly better than a placement without redundant ones, though
neither expresses more than the other. Multipliers on the embedding help, and those on the rows of the head do harm.

Claims, from valid losses after the last step, paired by seed, by AdamW:

- symmetry_free - all > 2 standard errors.
- (all without the embedding) - all > 2 standard errors.
- (all and the rows of the head) - all > 2 standard errors (`--full`).

The differences of two placements to `all` are reported; the paper claims nothing for them: one scalar per matrix, and
(`--full`) columns that Q, K and V share, and gate and up, as in an implementation that scales their common input. With
`--full`, symmetry_free also at twice the multipliers' learning rate: two redundant multipliers that start equal move
together, so `all` has twice the effective rate on their product, and this run shows whether that is the reason.
"""

from __future__ import annotations

from pathlib import Path

from examples.paper import plots
from examples.paper.arms import ALL, SCALAR, placed
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.matrices import BLOCK_ROLES
from examples.paper.paired import Estimate, paired, verdict
from examples.paper.setting import Setting

ERRORS = 2.0
"""Number of standard errors by which the loss must be higher than with `all`."""
FASTER = 2.0
"""Factor of the multipliers' learning rate in the control."""

EVERYWHERE = ALL["adamw"]
SYMMETRY_FREE = placed("symmetry_free", "symmetry_free")
NO_EMBEDDING = placed("all but the embedding", {role: ["row", "col"] for role in BLOCK_ROLES})
HEAD_ROWS = placed(
    "all and the rows of the head", {**{role: ["row", "col"] for role in (*BLOCK_ROLES, "embedding")}, "head": ["row"]}
)
SHARED = Arm("adamw, all, shared columns", {"optimizer.name": "adamw", "multipliers.shared_columns": True})


def faster(setting: Setting) -> Arm:
    """Return symmetry_free at FASTER times the multipliers' learning rate."""
    lr = FASTER * setting.rates["adamw"][0]
    return Arm(f"{SYMMETRY_FREE.name}, multipliers' lr x {FASTER:g}", {**SYMMETRY_FREE.overrides, "multipliers.lr": lr})


def gap(results: Results, arm: Arm) -> Estimate:
    """Return the paired difference of the valid loss, an arm minus `all`."""
    return paired(results.valid(EVERYWHERE), results.valid(arm))


def is_worse(results: Results, arm: Arm) -> Measurement:
    """Measure the paired difference to `all`."""
    measured = gap(results, arm)
    return Measurement(measured, verdict(measured.mean > ERRORS * measured.error, measured), unit="nats")


def reported(results: Results, arm: Arm) -> Measurement:
    """Measure the paired difference to `all`, without a verdict."""
    return Measurement(gap(results, arm), "reported", unit="nats")


_WORSE = f"paired difference of the valid loss > {ERRORS:g} SE"

CLAIMS = (
    Claim("symmetry_free is worse than all", _WORSE, lambda results: is_worse(results, SYMMETRY_FREE)),
    Claim("all but the embedding is worse than all", _WORSE, lambda results: is_worse(results, NO_EMBEDDING)),
    Claim(
        "all and the rows of the head is worse than all (--full)", _WORSE, lambda results: is_worse(results, HEAD_ROWS)
    ),
    Claim("One scalar per matrix, against all", "none", lambda results: reported(results, SCALAR)),
    Claim(
        "Columns shared by Q, K, V and by gate, up, against all (--full)",
        "none",
        lambda results: reported(results, SHARED),
    ),
    Claim(
        f"symmetry_free at {FASTER:g} x the multipliers' learning rate, against all (--full)",
        "none",
        lambda results: reported(results, faster(results.setting)),
    ),
)


def plot(results: Results, file: Path) -> None:
    """Draw the paired differences to `all`: a dot for each seed, mean and one standard error."""
    measured: dict[str, Estimate] = {}
    for arm in (SYMMETRY_FREE, SCALAR, NO_EMBEDDING, HEAD_ROWS, SHARED, faster(results.setting)):
        try:
            measured[arm.name.partition(", ")[2]] = gap(results, arm)
        except NotRun:
            continue
    plots.differences(file, measured, "valid loss, placement - all (nats)")


EXPERIMENT = Experiment(
    "E13",
    "Placement",
    CLAIMS,
    lambda setting: [EVERYWHERE, SYMMETRY_FREE, SCALAR, NO_EMBEDDING],
    plot,
    lambda setting: [HEAD_ROWS, SHARED, faster(setting)],
    losses_only=True,
)
