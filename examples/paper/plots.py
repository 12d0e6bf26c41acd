"""Plots of the report. matplotlib is imported only here, and only when something is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper.experiment import NotRun
from examples.paper.paired import Estimate

SMOOTHING_STEPS = 40
"""Number of steps over which a difference of training losses is averaged in a plot."""


@contextlib.contextmanager
def figure(file: Path, rows: int, columns: int, width: float = 4.6, height: float = 3.6) -> Iterator[list[Any]]:
    """Yield the panels of a figure, row by row, and write it to `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    try:
        for panel in panels.flat:
            panel.grid(alpha=0.3)
        yield list(panels.flat)
        drawn.savefig(file, dpi=110)
    finally:
        pyplot.close(drawn)


def smoothed(panel: Any, steps: Sequence[int], lines: np.ndarray, label: str) -> None:
    """Draw the mean of lines [seed, step] over the seeds, averaged over SMOOTHING_STEPS, and a band of one error."""
    window = min(SMOOTHING_STEPS, lines.shape[1])
    kernel = np.full(window, 1.0 / window)
    smooth = np.asarray([np.convolve(line, kernel, mode="valid") for line in lines])
    middle = np.asarray(steps[window - 1 :]) - (window - 1) / 2
    mean = smooth.mean(axis=0)
    (drawn,) = panel.plot(middle, mean, label=label)
    if len(lines) > 1:
        error = smooth.std(axis=0, ddof=1) / np.sqrt(len(lines))
        panel.fill_between(middle, mean - error, mean + error, color=drawn.get_color(), alpha=0.25, linewidth=0)


def differences(file: Path, gaps: Mapping[str, Estimate], label: str) -> None:
    """Draw paired differences by name into a file: a dot for each seed, beside them mean and one standard error.

    Raises:
        NotRun: there are none.
    """
    if not gaps:
        raise NotRun("no pair of arms is complete")
    with figure(file, 1, 1, width=6.0) as (panel,):
        for position, gap in enumerate(gaps.values()):
            panel.scatter([position] * len(gap.values), gap.values, color="tab:gray", s=14)
            error = 0.0 if np.isnan(gap.error) else gap.error
            panel.errorbar([position + 0.1], [gap.mean], yerr=[error], fmt="o", color="tab:blue", capsize=4)
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(gaps)), list(gaps), fontsize=8)
        panel.set(ylabel=label)
