"""E5: multipliers make the norms of the effective weight's rows diverse (Fig. 3).

Paper: without multipliers, noise and decay give all rows of a matrix nearly the same norm; with multipliers the norms
of W_eff's rows are spread widely.

Claims, by AdamW, from the checkpoint at the end of the constant stage. The norm of a row is its RMS divided by the mean
over the rows of its layer's matrix; the norms of a role are joined over the layers; CV is their coefficient of
variation. With 192 columns chance alone gives a CV of 0.05.

- CV of W_eff with multipliers / CV without >= 1.4, for q, k, v, gate and up, in every seed.
- CV of the latent W with multipliers / CV without in [0.75, 1.25], for the same roles, in every seed: the spread is the
  multipliers'.
- Control, with `--full`: without multipliers, weight decay 0.1 instead of 0.8 also leaves the rows narrow; the claim
  above holds against these runs too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import plots
from examples.paper.arms import ALL, NONE
from examples.paper.experiment import Claim, Experiment, Measurement, Results
from examples.paper.grid import Arm
from examples.paper.matrices import decades, pooled_norms, variations
from examples.paper.paired import estimate, verdict
from megamult.checkpoint.saved import SavedCheckpoint

ROLES = ("q", "k", "v", "gate", "up")
WIDER = 1.4
"""Smallest ratio of the CVs of W_eff."""
UNCHANGED = 0.25
"""Largest relative change of the latent W's CV."""

WITHOUT, WITH = NONE["adamw"], ALL["adamw"]
CONTROL = Arm("adamw, none, decay 0.1", {**WITHOUT.overrides, "optimizer.weight_decay": 0.1})


@lru_cache(maxsize=64)
def _norms(path: Path) -> dict[str, dict[str, np.ndarray]]:
    return pooled_norms(SavedCheckpoint(path))


def norms(results: Results, arm: Arm, seed: int, kind: str) -> dict[str, np.ndarray]:
    """Return the relative norms of one kind by role (:func:`pooled_norms`)."""
    return _norms(results.checkpoint(arm, seed, results.setting.constant_end).path)[kind]


def ratios(results: Results, without: Arm, with_it: Arm, kind: str, roles: Sequence[str]) -> list[dict[str, float]]:
    """Return CV with multipliers / CV without by role, seed by seed."""
    found = []
    for seed in results.seeds:
        narrow, wide = (variations(norms(results, arm, seed, kind)) for arm in (without, with_it))
        found.append({role: wide[role] / narrow[role] for role in roles})
    return found


def _means(measured: Sequence[Mapping[str, float]]) -> str:
    """Describe the mean over seeds by role."""
    return ", ".join(f"{role} {np.mean([seed[role] for seed in measured]):.2f}" for role in measured[0])


def rows_are_wider(
    results: Results,
    without: Arm,
    with_it: Arm = WITH,
    roles: Sequence[str] = ROLES,
    shown: str = "gate",
    others: Sequence[str] = (),
) -> Measurement:
    """Measure the smallest ratio of the CVs of W_eff over the roles.

    Args:
        results: the runs.
        without, with_it: the two arms.
        roles: roles of which each must be wider.
        shown: role whose width the note reports.
        others: roles whose ratio the note reports.
    """
    measured = ratios(results, without, with_it, "rows of W_eff", roles)
    smallest = [min(seed.values()) for seed in measured]
    columns = ratios(results, without, with_it, "columns of W_eff", roles)
    of_columns = np.mean([list(seed.values()) for seed in columns])
    apart = f"; not claimed: {_means(ratios(results, without, with_it, 'rows of W_eff', others))}" if others else ""
    seed = results.seeds[0]
    narrow, wide = (decades(norms(results, arm, seed, "rows of W_eff")[shown]) for arm in (without, with_it))
    note = (
        f"smallest ratio; means: {_means(measured)}{apart}; columns {of_columns:.2f}; 5 to 95 % of {shown}'s rows, "
        f"seed {seed}: {narrow:.2f} -> {wide:.2f} decades"
    )
    effect = estimate([value - 1 for value in smallest])
    return Measurement(estimate(smallest), verdict(min(smallest) >= WIDER, effect), note)


def latent_rows_are_not(
    results: Results, without: Arm = WITHOUT, with_it: Arm = WITH, roles: Sequence[str] = ROLES
) -> Measurement:
    """Measure the largest relative change of the latent W's CV over the roles; arguments as in
    :func:`rows_are_wider`."""
    measured = ratios(results, without, with_it, "rows of W", roles)
    changes = [max(abs(value - 1) for value in seed.values()) for seed in measured]
    margin = estimate([UNCHANGED - value for value in changes])
    note = f"largest |ratio - 1|; mean ratios: {_means(measured)}"
    return Measurement(estimate(changes), verdict(max(changes) <= UNCHANGED, margin), note)


CLAIMS = (
    Claim(
        "Rows of W_eff have more diverse norms with multipliers",
        f"CV with / CV without >= {WIDER:g} for {', '.join(ROLES)} in every seed",
        lambda results: rows_are_wider(results, WITHOUT),
    ),
    Claim(
        "Rows of the latent W do not",
        f"CV with / CV without within {100 * UNCHANGED:g} % of 1",
        latent_rows_are_not,
    ),
    Claim(
        "Also against runs without multipliers at weight decay 0.1 (--full)",
        f"CV with / CV without >= {WIDER:g}",
        lambda results: rows_are_wider(results, CONTROL),
    ),
)


def histograms(
    panels: Sequence[Any], results: Results, without: Arm, with_it: Arm, roles: Sequence[str], bins: int = 60
) -> None:
    """Draw histograms of the relative norms of W_eff's rows, with logarithmic bins: one panel for each role."""
    edges = np.geomspace(0.1, 10.0, bins)
    for panel, role in zip(panels, roles, strict=True):
        for arm, label, colour in ((without, "without", "tab:gray"), (with_it, "with multipliers", "tab:blue")):
            values = np.concatenate([norms(results, arm, seed, "rows of W_eff")[role] for seed in results.seeds])
            panel.hist(np.clip(values, edges[0], edges[-1]), edges, density=True, alpha=0.6, label=label, color=colour)
        panel.set(xscale="log", title=role, xlabel="norm of a row / mean")
    panels[0].legend(fontsize=7)


def plot(results: Results, file: Path) -> None:
    """Draw histograms of the relative norms of W_eff's rows by role."""
    with plots.figure(file, 2, 4, width=3.2, height=2.6) as panels:
        histograms(panels, results, WITHOUT, WITH, (*ROLES, "attention_out", "down", "embedding"))


EXPERIMENT = Experiment("E5", "Norms of rows", CLAIMS, lambda setting: [WITHOUT, WITH], plot, lambda setting: [CONTROL])
