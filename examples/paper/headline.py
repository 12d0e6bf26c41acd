"""Headline: does a model learn more with multipliers, by AdamW and by Muon?

Paper (section 5, Fig. 7, configuration NONE; Table 2): multipliers improve their parent with both optimizers, and the
loss differs by 0.4 to 1 %.

Claim, for each optimizer and for two statistics (training loss over the last 100 steps, valid loss after the last
step): the mean over seeds of the paired difference, with multipliers minus without, is below -2 standard errors. Both
arms have the same learning rate and weight decay; neither is tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import plots
from examples.paper.arms import ALL, NAMES, NONE, OPTIMIZERS
from examples.paper.experiment import LOSSES, Claim, Experiment, Loss, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, estimate, verdict

ERRORS = 2.0
"""Number of standard errors by which the loss must be lower."""


def lower(gap: Estimate) -> bool:
    """Return whether a difference of losses is below -ERRORS standard errors."""
    return gap.mean < -ERRORS * gap.error


def compare(results: Results, without: Arm, with_it: Arm, kind: Loss) -> Measurement:
    """Measure the paired difference of a loss, `with_it` - `without`."""
    gap = results.gap(kind, without, with_it)
    level = estimate(getattr(results, kind)(without)).mean
    words = f"{100 * gap.mean / level:+.2f} % of {level:.4f}"
    note = results.note("the order of the data", words) if kind == "train" else words
    return Measurement(gap, verdict(lower(gap), gap), note, "nats")


def _claim(optimizer: str, kind: Loss) -> Claim:
    return Claim(
        f"{NAMES[optimizer]}: the {LOSSES[kind]} is lower with multipliers",
        f"paired difference < -{ERRORS:g} SE",
        lambda results: compare(results, NONE[optimizer], ALL[optimizer], kind),
    )


Gaps = Mapping[str, tuple[list[int], np.ndarray]]
"""Steps, and differences of the training loss [seed, step], by optimizer."""


def training_gaps(results: Results, without: Mapping[str, Arm], with_it: Mapping[str, Arm]) -> Gaps:
    """Return the differences of the training loss of the optimizers whose runs are complete.

    Args:
        results: the runs.
        without, with_it: arms by optimizer.

    Raises:
        NotRun: there is no such optimizer.
    """
    measured: dict[str, tuple[list[int], np.ndarray]] = {}
    for optimizer in OPTIMIZERS:
        try:
            pairs = zip(results.all_curves(without[optimizer]), results.all_curves(with_it[optimizer]), strict=True)
        except NotRun:
            continue
        gaps = [[b.train[step] - a.train[step] for step in sorted(a.train)] for a, b in pairs]
        measured[optimizer] = list(range(1, len(gaps[0]) + 1)), np.asarray(gaps)
    if not measured:
        raise NotRun("no pair of runs is complete")
    return measured


def draw_losses(
    left: Any, right: Any, results: Results, gaps: Gaps, without: Mapping[str, Arm], with_it: Mapping[str, Arm]
) -> None:
    """Draw the difference of the training loss over the steps, and the valid losses of all runs as dots.

    Args:
        left, right: panels of the two.
        results: the runs.
        gaps: what is drawn on the left (:func:`training_gaps`).
        without, with_it: arms by optimizer.
    """
    for position, (optimizer, (steps, lines)) in enumerate(gaps.items()):
        plots.smoothed(left, steps, lines, NAMES[optimizer])
        for offset, arms, colour in ((-0.12, without, "tab:gray"), (0.12, with_it, "tab:blue")):
            values = results.valid(arms[optimizer])
            label = {-0.12: "without", 0.12: "with multipliers"}[offset] if position == 0 else None
            right.scatter([position + offset] * len(values), values, color=colour, label=label)
    left.axhline(0.0, color="black", linewidth=0.8)
    left.axvspan(results.setting.constant_end, results.setting.steps, color="tab:gray", alpha=0.15)
    left.set(xlabel="step (shaded: decay)", ylabel="training loss, with - without (nats)")
    left.legend()
    right.set_xticks(range(len(gaps)), [NAMES[optimizer] for optimizer in gaps])
    right.set(ylabel="valid loss (nats per token), one dot a seed")
    right.legend()


def plot(results: Results, file: Path) -> None:
    """Draw the difference of the training loss over the steps, and the valid losses of all runs as dots."""
    gaps = training_gaps(results, NONE, ALL)
    with plots.figure(file, 1, 2) as (left, right):
        draw_losses(left, right, results, gaps, NONE, ALL)


EXPERIMENT = Experiment(
    "headline",
    "With and without multipliers, two optimizers",
    [_claim(optimizer, kind) for optimizer in OPTIMIZERS for kind in LOSSES],
    lambda setting: [*NONE.values(), *ALL.values()],
    plot,
)
