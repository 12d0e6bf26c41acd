"""Headline: does a model learn more with multipliers, by AdamW and by Muon?

Paper (section 5, Fig. 7, configuration NONE; Table 2): multipliers improve their parent with both optimizers, and the
loss differs by 0.4 to 1 %.

Claim, for each optimizer and for two statistics (training loss over the last 100 steps, valid loss after the last
step): the mean over seeds of the paired difference, with multipliers minus without, is below -2 standard errors. Both
arms have the same learning rate and weight decay; neither is tuned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.arms import ALL, NAMES, NONE, OPTIMIZERS
from examples.paper.experiment import LOSSES, Claim, Experiment, Loss, Measurement, NotRun, Results
from examples.paper.paired import Estimate, estimate, verdict

ERRORS = 2.0
"""Number of standard errors by which the loss must be lower."""


def lower(gap: Estimate) -> bool:
    """Return whether a difference of losses is below -ERRORS standard errors."""
    return gap.mean < -ERRORS * gap.error


def compare(results: Results, optimizer: str, kind: Loss) -> Measurement:
    """Return the paired difference of a loss."""
    gap = results.gap(kind, NONE[optimizer], ALL[optimizer])
    without = estimate(getattr(results, kind)(NONE[optimizer])).mean
    words = f"{100 * gap.mean / without:+.2f} % of {without:.4f}"
    note = results.note("the order of the data", words) if kind == "train" else words
    return Measurement(gap, verdict(lower(gap), gap), note, "nats")


def _claim(optimizer: str, kind: Loss) -> Claim:
    return Claim(
        f"{NAMES[optimizer]}: the {LOSSES[kind]} is lower with multipliers",
        f"paired difference < -{ERRORS:g} SE",
        lambda results: compare(results, optimizer, kind),
    )


def plot(results: Results, file: Path) -> None:
    """Draw the difference of the training loss over the steps, and the valid losses of all runs as dots."""
    measured: dict[str, tuple[list[int], np.ndarray]] = {}
    for optimizer in OPTIMIZERS:
        try:
            pairs = zip(results.all_curves(NONE[optimizer]), results.all_curves(ALL[optimizer]), strict=True)
        except NotRun:
            continue
        gaps = [[b.train[step] - a.train[step] for step in sorted(a.train)] for a, b in pairs]
        measured[optimizer] = list(range(1, len(gaps[0]) + 1)), np.asarray(gaps)
    if not measured:
        raise NotRun("no pair of runs is complete")
    with plots.figure(file, 1, 2) as (left, right):
        for position, (optimizer, (steps, gaps)) in enumerate(measured.items()):
            plots.smoothed(left, steps, gaps, NAMES[optimizer])
            for offset, arms, colour in ((-0.12, NONE, "tab:gray"), (0.12, ALL, "tab:blue")):
                values = results.valid(arms[optimizer])
                label = {-0.12: "without", 0.12: "with multipliers"}[offset] if position == 0 else None
                right.scatter([position + offset] * len(values), values, color=colour, label=label)
        left.axhline(0.0, color="black", linewidth=0.8)
        left.axvspan(results.setting.constant_end, results.setting.steps, color="tab:gray", alpha=0.15)
        left.set(xlabel="step (shaded: decay)", ylabel="training loss, with - without (nats)")
        left.legend()
        right.set_xticks(range(len(measured)), [NAMES[optimizer] for optimizer in measured])
        right.set(ylabel="valid loss (nats per token), one dot a seed")
        right.legend()


EXPERIMENT = Experiment(
    "headline",
    "With and without multipliers, two optimizers",
    [_claim(optimizer, kind) for optimizer in OPTIMIZERS for kind in LOSSES],
    lambda setting: [*NONE.values(), *ALL.values()],
    plot,
)
