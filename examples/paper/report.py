"""The report: for each claim its threshold, the measured figure and a verdict; one plot for each experiment."""

from __future__ import annotations

import collections
import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.paired import Estimate
from examples.running.attempts import attempts
from examples.running.machine import commit, machine, versions
from megamult.monitor.screen import duration

EXPLANATION = """\
Verdicts: **reproduced**: the figures meet the threshold, which was committed before the runs. **not reproduced**: they
do not. **not resolved**: the standard error is above half of the effect, or unknown because there is one seed. **not
run**: runs are missing. **reported**: the paper claims nothing. Figures are means over seeds ± standard error, and then
the values of the single seeds."""


def measure(claim: Claim, results: Results, seeds: int | None = None) -> Measurement:
    """Return the measurement of a claim; `not run`, with the reason, if runs are missing or cannot be read.

    Args:
        claim: the claim.
        results: the runs.
        seeds: number of the first seeds that are enough if the runs of all seeds are not complete.
    """
    try:
        return claim.measure(results)
    except (NotRun, ValueError, OSError) as error:
        if seeds is not None and seeds < len(results.seeds):
            return measure(claim, results.first_seeds(seeds))
        return Measurement(None, "not run", str(error))


def figure_text(found: Estimate, unit: str) -> str:
    """Return a mean with its standard error, and the values of the seeds."""
    error = "" if math.isnan(found.error) else f" ± {found.error:.2g}"
    unit = f" {unit}" if unit else ""
    seeds = f" ({', '.join(f'{value:.4g}' for value in found.values)})" if len(found.values) > 1 else ""
    return f"{found.mean:.4g}{error}{unit}{seeds}"


def row(experiment: Experiment, claim: Claim, measured: Measurement) -> str:
    """Return a claim's line of the table."""
    figures = [] if measured.estimate is None else [figure_text(measured.estimate, measured.unit)]
    cells = [
        experiment.name,
        claim.text,
        claim.threshold,
        "; ".join([*figures, *filter(None, [measured.note])]),
        f"**{measured.verdict}**",
    ]
    # A bar or a line break would end the cell.
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def write(results: Results, experiments: Sequence[Experiment], command: str, file: Path) -> str:
    """Measure all claims, write the report and the plots beside it, and return the report.

    Args:
        results: the runs.
        experiments: experiments to report on.
        command: command that makes the report, for the reader.
        file: file of the report. Plots are beside it.
    """
    rows, verdicts, pictures = [], collections.Counter[str](), []
    for experiment in experiments:
        for claim in experiment.claims:
            measured = measure(claim, results, experiment.seeds)
            verdicts[measured.verdict] += 1
            rows.append(row(experiment, claim, measured))
        picture = file.with_name(f"{experiment.name.lower()}.png")
        few = [] if experiment.seeds is None else [results.first_seeds(experiment.seeds)]
        if any(drawn(experiment.plot, each, picture) for each in (results, *few)):
            pictures.append(f"## {experiment.name}: {experiment.title}\n\n![{experiment.title}]({picture.name})")
    setting = results.setting
    text = f"""# Learnable multipliers (arXiv 2601.04890): claims and verdicts

`{command}`

{"; ".join(f"{count} {verdict}" for verdict, count in verdicts.items())}.

| | claim | threshold | measured | verdict |
|---|---|---|---|---|
{chr(10).join(rows)}

{EXPLANATION}

{chr(10).join([*(f"{picture}{chr(10)}" for picture in pictures)])}
- Setting `{setting.name}`: {setting.steps} steps, of which {setting.steps - setting.constant_end} decay; seeds \
{", ".join(map(str, results.seeds))}; the same seed means the same initial weights and the same order of the data.
- Learning rate and weight decay: {_rates(results)}. They were not tuned.
- Machine: {machine()}.
- Software: {versions()}{f", commit {commit()}" if commit() else ""}.
- {_time(results)}
{_kept(results)}- Written {datetime.datetime.now(datetime.UTC):%d %B %Y}.
"""
    file.write_text(text, encoding="utf-8")
    return text


def drawn(plot: Callable[[Results, Path], None], results: Results, file: Path) -> bool:
    """Draw a figure, and return whether there is one. A figure of an earlier report is removed."""
    file.unlink(missing_ok=True)
    try:
        plot(results, file)
    except (NotRun, ValueError, OSError):
        return False
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plots: matplotlib is missing; install the extra `reproduce`", flush=True)
        return False
    return True


def _rates(results: Results) -> str:
    pairs = results.setting.rates.items()
    return ", ".join(f"{name} {lr:g} and {weight_decay:g}" for name, (lr, weight_decay) in pairs)


def _time(results: Results) -> str:
    """Describe how long all runs in the folder took."""
    folder = results.grid.folder
    directories = [folder / file.name.removesuffix(".attempts.jsonl") for file in folder.glob("*.attempts.jsonl")]
    made = [attempts(directory) for directory in directories]
    seconds = sum(attempt.seconds for each in made for attempt in each)
    return f"All runs here: {len(made)} in {sum(map(len, made))} starts, {duration(seconds)} one after the other."


def _kept(results: Results) -> str:
    """Describe the runs of which only kept losses were read; nothing if there are none."""
    if not (lines := results.kept_lines_read()):
        return ""
    sources = collections.Counter((line.machine, line.software, line.commit, line.date) for line in lines)
    return "".join(
        f"- {count} {'run' if count == 1 else 'runs'} read from kept losses: {machine}; {software}, commit {commit}, "
        f"{date}.\n"
        for (machine, software, commit, date), count in sorted(sources.items())
    )
