"""The report of `examples/reproduce/run.sh`: valid losses, a comparison with the spread over seeds, and curves.

The program reads metrics.jsonl of every run, and writes report.md and curves.png beside the runs.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.running.attempts import attempts
from examples.running.curves import Curves, read_curves
from examples.running.machine import duration, machine, versions

IMPLEMENTATIONS = ("none", "layer")
NAMES = {"none": "without multipliers", "layer": "with multipliers"}
PLOT = "curves.png"


def run_dir(output: Path, implementation: str, seed: int) -> Path:
    """Return the directory of one run."""
    return output / f"{implementation}_seed_{seed}"


def spread(values: Iterable[float]) -> float:
    """Return the largest value minus the smallest."""
    values = list(values)
    return max(values) - min(values)


def verdict(without: Sequence[float], with_multipliers: Sequence[float]) -> str:
    """Describe how valid losses of the same seeds compare. A difference of means counts if it exceeds both spreads."""
    gap = statistics.mean(with_multipliers) - statistics.mean(without)
    widest = max(spread(without), spread(with_multipliers))
    lower = sum(a < b for a, b in zip(with_multipliers, without, strict=True))
    seeds = f"with multipliers it is lower for {lower} of {len(without)} seeds"
    if len(without) < 2:
        return f"The valid losses differ by {gap:+.4f}. One seed says nothing about how far chance moves them."
    if abs(gap) <= widest:
        return (
            f"The means differ by {gap:+.4f} nats per token, within the spread of the seeds ({widest:.4f}): these runs "
            f"do not tell the two apart ({seeds})."
        )
    return (
        f"The mean valid loss with multipliers is {'lower' if gap < 0 else 'higher'} by {abs(gap):.4f} nats per token, "
        f"beyond the spread of the seeds ({widest:.4f}; {seeds})."
    )


def table(results: dict[str, list[float]], seeds: Sequence[int]) -> str:
    """Return a Markdown table of the final valid losses by implementation and seed."""
    rows = [
        ["valid loss", *(f"seed {seed}" for seed in seeds), "mean ± standard deviation", "largest - smallest"],
        ["---"] * (len(seeds) + 3),
    ]
    for implementation, losses in results.items():
        deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        mean = f"{statistics.mean(losses):.4f}{deviation}"
        rows.append([NAMES[implementation], *(f"{loss:.4f}" for loss in losses), mean, f"{spread(losses):.4f}"])
    gaps = [a - b for a, b in zip(results["layer"], results["none"], strict=True)]
    rows.append(["difference", *(f"{gap:+.4f}" for gap in gaps), f"{statistics.mean(gaps):+.4f}", ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(curves: dict[str, list[Curves]], file: Path) -> None:
    """Plot valid and training losses: the mean over the seeds as a line, and the range over the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, kind in zip(panels, ("valid", "train"), strict=True):
        for (implementation, runs), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
            lines = [getattr(run, kind) for run in runs]
            steps = sorted(lines[0])
            columns = [[line[step] for line in lines] for step in steps]
            means = [statistics.mean(column) for column in columns]
            marker = "o" if kind == "valid" else ""
            panel.plot(steps, means, color=colour, marker=marker, markersize=3, label=NAMES[implementation])
            lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
            panel.fill_between(steps, lowest, highest, color=colour, alpha=0.25, linewidth=0)
        panel.set(xlabel="step", ylabel=f"{kind} loss (nats per token)")
        panel.grid(alpha=0.3)
        panel.legend()
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"mean and range of {seeds} seed{'s' if seeds > 1 else ''}")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write(output: Path, seeds: Sequence[int], command: str) -> str:
    """Write report.md and the plot into `output`; return the text of the report.

    Raises:
        ValueError: a run is not complete, or diverged.
    """
    curves = {
        implementation: [read_curves(run_dir(output, implementation, seed)) for seed in seeds]
        for implementation in IMPLEMENTATIONS
    }
    results = {implementation: [run.result for run in runs] for implementation, runs in curves.items()}
    made = [attempt for name in IMPLEMENTATIONS for seed in seeds for attempt in attempts(run_dir(output, name, seed))]
    steps = max(curves["none"][0].train)
    seconds = sum(attempt.seconds for attempt in made)
    text = f"""# With and without multipliers

`{command}`

{verdict(results["none"], results["layer"])}

{table(results, seeds)}

![training and valid losses]({PLOT})

- Each run: `examples/configs/quickstart.yaml` on the State of the Union speeches, {steps} steps; nats per token. The
  same seed means the same initial weights and the same order of the data in both rows.
- Both have the same hyperparameters, the learning rate included; neither was tuned here. A difference holds for these.
- Machine: {machine()}.
- Software: {versions()}.
- Wall time: {duration(seconds)} for {2 * len(seeds)} runs in {len(made)} starts, start-up and evaluation included.
- Written {datetime.datetime.now(datetime.UTC):%d %B %Y}.
"""
    plot(curves, output / PLOT)
    (output / "report.md").write_text(text, encoding="utf-8")
    return text
