"""E14: why multipliers leave the equilibrium that holds the matrices (the argument of section 2).

Paper: a matrix's elements get gradients of little signal and much noise; a multiplier's gradient is a sum over a row, a
column or a matrix, in which noise averages out. The paper does not measure this.

Claims, at the end of the constant stage, by AdamW. The ratio of a parameter is |mean| / sd of its gradient over 64
micro-batches, which the run would have read next; W, r and c are those of a run with placement `all`, s is that of a
run with one scalar per matrix. The medians are over all matrices of the blocks. Without any signal the median would be
0.084 = 0.6745 / sqrt(64).

- Median of scalars > 2 x median of row and column multipliers > 2 x 2 x median of matrix elements, in every seed.
- Embedding: the median over row multipliers of the 10 % most frequent tokens is above that of the 50 % rarest, among
  those that occur, in every seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.paper import plots
from examples.paper.arms import ALL, SCALAR
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import estimate, verdict
from examples.running.children import last_lines, run

BATCHES = 64
FACTOR = 2.0
"""Smallest ratio of the medians of scalars and vectors, and of vectors and matrices."""

WITH = ALL["adamw"]


def probed(results: Results, arm: Arm, seed: int) -> Mapping[str, Any]:
    """Return what `gradient_probe.py` finds at an arm's checkpoint. Half a minute the first time; it is kept.

    Raises:
        NotRun: the run is not complete, or the probe has failed.
    """
    checkpoint = results.checkpoint(arm, seed, results.setting.constant_end).path
    directory = results.grid.directory(results.run(arm, seed))
    output = directory.with_name(f"{directory.name}.gradients_{BATCHES}.json")
    if not output.exists():
        log = output.with_suffix(".log")
        module = "examples.paper.gradient_probe"
        command = [sys.executable, "-m", module, str(checkpoint), "--output", str(output), "--batches", str(BATCHES)]
        code = run(command, log)
        if code:
            raise NotRun(f"the probe of {checkpoint} ended with exit code {code}: {last_lines(log, 1)}")
    found: Mapping[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def medians(results: Results, seed: int) -> dict[str, float]:
    """Return the medians of matrix, vector and scalar."""
    placed = probed(results, WITH, seed)["blocks"]
    scalars = probed(results, SCALAR, seed)["blocks"]
    return {kind: source[kind]["median"] for kind, source in zip(KINDS, (placed, placed, scalars), strict=True)}


KINDS = ("matrix", "vector", "scalar")


def signal_grows(results: Results) -> Measurement:
    """Measure the smaller of the two ratios of medians."""
    found = [medians(results, seed) for seed in results.seeds]
    smaller = [min(each["scalar"] / each["vector"], each["vector"] / each["matrix"]) for each in found]
    means = ", ".join(f"{kind} {sum(each[kind] for each in found) / len(found):.3f}" for kind in KINDS)
    effect = estimate([value - 1 for value in smaller])
    note = f"smaller of the two ratios; medians: {means}"
    return Measurement(estimate(smaller), verdict(min(smaller) > FACTOR, effect), note)


def frequent_tokens(results: Results) -> Measurement:
    """Measure the ratio of the medians of frequent and of rare tokens."""
    rows = [probed(results, WITH, seed)["embedding_rows"] for seed in results.seeds]
    ratios = [each["frequent"]["median"] / each["rare"]["median"] for each in rows]
    means = ", ".join(f"{kind} {sum(each[kind]['median'] for each in rows) / len(rows):.3f}" for kind in rows[0])
    effect = estimate([value - 1 for value in ratios])
    return Measurement(estimate(ratios), verdict(min(ratios) > 1, effect), f"ratio; medians: {means}")


CLAIMS = (
    Claim(
        "The gradient's signal-to-noise ratio grows from matrix to vector to scalar",
        f"each median > {FACTOR:g} x the next",
        signal_grows,
    ),
    Claim("It is larger for rows of frequent tokens than of rare ones", "ratio of medians > 1", frequent_tokens),
)


def plot(results: Results, file: Path) -> None:
    """Draw medians with 5th and 95th percentile by role and side, of the first seed."""
    seed = results.seeds[0]
    entries = {**probed(results, WITH, seed)["by_role"]}
    scalars = probed(results, SCALAR, seed)["by_role"]
    entries |= {key: value for key, value in scalars.items() if key.endswith("/scalar")}
    entries = {key: value for key, value in entries.items() if value["count"]}
    order = sorted(entries, key=lambda key: (("W", "row", "col", "scalar").index(key.partition("/")[2]), key))
    colours = {"W": "tab:gray", "row": "tab:blue", "col": "tab:cyan", "scalar": "tab:red"}
    with plots.figure(file, 1, 1, width=9.0) as (panel,):
        for position, key in enumerate(order):
            each = entries[key]
            spread = [[each["median"] - each["low"]], [each["high"] - each["median"]]]
            colour = colours[key.partition("/")[2]]
            panel.errorbar([position], [each["median"]], yerr=spread, fmt="o", color=colour, capsize=2, markersize=4)
        panel.axhline(0.6745 / BATCHES**0.5, color="black", linestyle="--", linewidth=0.8, label="median of pure noise")
        panel.set_xticks(range(len(order)), order, rotation=70, fontsize=7)
        panel.set(yscale="log", ylabel="|mean| / sd of the gradient (5 to 95 %)")
        panel.legend()


EXPERIMENT = Experiment("E14", "Signal in the gradients", CLAIMS, lambda setting: [WITH, SCALAR], plot)
