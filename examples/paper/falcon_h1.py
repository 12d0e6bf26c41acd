"""A small Falcon-H1, the architecture of the paper's own runs, with and without multipliers (`--only falcon`).

Paper: multipliers improve a hybrid of attention and Mamba-2 with AdamW and with Muon (Table 2), spread the norms of
W_eff's rows in every block (Fig. 3), and take a scale of their own in each layer (Fig. 2, which shows the depth of
attention, MLP and the mixer's dt).

The model is that of the setting with a mixer beside attention in each of its layers: 4 heads of 32 channels, state 16.
It has the setting's schedule, learning rates and weight decay, untuned, without multipliers and with row and column
multipliers on every matrix but the head.

Claims, for each optimizer:

- The valid loss after the last step is lower with multipliers: paired difference < -2 SE.
- CV of the norms of W_eff's rows with multipliers / CV without >= 1.4 for z, x, B and C in every seed, measured as in
  E5 (`e05_row_norms.py`) at the end of the constant stage. dt has one row a head, 16 in all, which is too few: without
  any effect the ratio of two such CVs has an error of 30 % (that of B or C, 12 %). It is reported separately, as is the
  output projection, whose rows E5 does not claim either. The claim can fail where the paper's would not, because
  the convolution can scale the rows of x, B and C without multipliers too: its weights have no decay.
- CV of the latent W's rows, for the same four roles, changes by 25 % at most. (Found by simulation while the runs were
  made, thresholds unchanged: with the errors above a true claim fails in at least one of three seeds in a third of all
  cases, because of B and C.)
- dt's multipliers differ from layer to layer: with s = RMS of r x RMS of c, the RMS of the factors r_i c_j of W_dt's
  elements after the last step, the standard deviation of ln s over the layers is more than twice that over the seeds.
  No text of the paper about dt was at hand, only that Fig. 2 shows it, so this is E4's claim about scales of layers;
  Spearman's correlation of s with the layer is reported and not claimed.

Before these claims were written, one run of 80 steps with multipliers was made for each optimizer (seed 7, which no
experiment uses), to see that the learning rates do not diverge. They do not: the training loss fell to 5.8 and 5.3, and
from step 40 on no gradient had a norm above 0.7 and 1.1. During Muon's warm-up it reached 14 (step 18), and gradients
are clipped at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import e05_row_norms as rows
from examples.paper import headline, plots
from examples.paper.arms import ALL, NAMES, NONE, OPTIMIZERS
from examples.paper.experiment import LOSSES, Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.matrices import matrices
from examples.paper.paired import estimate, spearman, verdict

HYBRID: Mapping[str, Any] = {
    "model.architecture": "falcon_h1",
    "model.ssm_heads": 4,
    "model.ssm_head_dim": 32,
    "model.ssm_state_size": 16,
    "model.ssm_chunk": 64,
}
"""Keys of the model beside those of the setting."""
ROLES = ("ssm_z", "ssm_x", "ssm_b", "ssm_c")
"""Roles whose rows are claimed to be wider with multipliers."""
OTHERS = ("ssm_dt", "ssm_out")
"""Roles whose rows are only reported."""
APART = 2.0
"""Factor by which the spread over layers must exceed that over seeds."""


def _hybrid(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    return {name: Arm(f"falcon_h1, {arm.name}", {**arm.overrides, **HYBRID}) for name, arm in arms.items()}


WITHOUT, WITH = _hybrid(NONE), _hybrid(ALL)
"""Runs without and with multipliers, by optimizer."""


def log_scales(results: Results, optimizer: str) -> np.ndarray:
    """Return ln(RMS of r x RMS of c) of dt's matrices after the last step, [seed, layer]."""
    found = []
    for seed in results.seeds:
        saved = results.checkpoint(WITH[optimizer], seed, results.setting.steps)
        of_dt = [matrix for matrix in matrices(saved) if matrix.role == "ssm_dt"]
        squares = [[each.double().square().mean() for each in matrix.multipliers.values()] for matrix in of_dt]
        found.append([0.5 * math.log(math.prod(map(float, each))) for each in squares])
    return np.asarray(found)


def layers_differ(results: Results, optimizer: str) -> Measurement:
    """Measure the standard deviation of ln s over the layers, seed by seed, against that over the seeds."""
    logs = log_scales(results, optimizer)
    if len(logs) < 2:
        raise NotRun("the spread over seeds needs two seeds: give more --seeds")
    noise = math.sqrt(float(logs.var(axis=0, ddof=1).mean()))
    spread = estimate(logs.std(axis=1, ddof=1).tolist())
    ranks = np.mean([spearman(range(logs.shape[1]), seed) for seed in logs])
    means = ", ".join(f"{value:.3f}" for value in np.exp(logs.mean(axis=0)))
    note = f"sd over seeds {noise:.3f}; s by layer: {means}; Spearman with the layer {ranks:+.2f}"
    margin = estimate([value - APART * noise for value in spread.values])
    return Measurement(spread, verdict(spread.mean > APART * noise, margin), note)


def _claims(optimizer: str) -> Sequence[Claim]:
    name, without, with_it = NAMES[optimizer], WITHOUT[optimizer], WITH[optimizer]
    roles = ", ".join(ROLES)
    return (
        Claim(
            f"{name}: the {LOSSES['valid']} of a hybrid is lower with multipliers",
            f"paired difference < -{headline.ERRORS:g} SE",
            lambda results: headline.compare(results, without, with_it, "valid"),
        ),
        Claim(
            f"{name}: rows of W_eff of the mixer have more diverse norms with multipliers",
            f"CV with / CV without >= {rows.WIDER:g} for {roles} in every seed",
            lambda results: rows.rows_are_wider(results, without, with_it, ROLES, "ssm_x", OTHERS),
        ),
        Claim(
            f"{name}: rows of the mixer's latent W do not",
            f"CV with / CV without within {100 * rows.UNCHANGED:g} % of 1",
            lambda results: rows.latent_rows_are_not(results, without, with_it, ROLES),
        ),
        Claim(
            f"{name}: dt's multipliers differ from layer to layer",
            f"sd over layers of ln(RMS of r x RMS of c) > {APART:g} x sd over seeds",
            lambda results: layers_differ(results, optimizer),
        ),
    )


def plot(results: Results, file: Path) -> None:
    """Draw losses, the norms of the mixer's rows, and dt's multipliers over the layers, of the optimizers whose runs
    are complete."""
    gaps = headline.training_gaps(results, WITHOUT, WITH)
    shown = (*ROLES, *OTHERS)
    with plots.figure(file, 1 + 2 * len(gaps), 3, width=4.0, height=3.0) as panels:
        headline.draw_losses(panels[0], panels[1], results, gaps, WITHOUT, WITH)
        for number, optimizer in enumerate(gaps):
            logs = log_scales(results, optimizer)
            for seed in logs:
                panels[2].plot(range(logs.shape[1]), np.exp(seed), "o", color=f"C{number}", markersize=3)
            panels[2].plot(range(logs.shape[1]), np.exp(logs.mean(axis=0)), color=f"C{number}", label=NAMES[optimizer])
        panels[2].set(xlabel="layer", ylabel="RMS of r x RMS of c", title="dt's multipliers")
        panels[2].legend()
        for number, optimizer in enumerate(gaps):
            begin = 3 + number * len(shown)
            pair = (WITHOUT[optimizer], WITH[optimizer])
            rows.histograms(panels[begin : begin + len(shown)], results, *pair, shown, bins=40)
            for panel, role in zip(panels[begin:], shown, strict=False):
                panel.set(title=f"{NAMES[optimizer]}: {role}")


EXPERIMENT = Experiment(
    "falcon",
    "A small Falcon-H1, two optimizers",
    [claim for optimizer in OPTIMIZERS for claim in _claims(optimizer)],
    lambda setting: [*WITHOUT.values(), *WITH.values()],
    plot,
    package=False,
)
