"""Learning rate of the multipliers: is there one default that helps both optimizers?

The paper does not give it. Runs with row and column multipliers everywhere (`all`) whose own learning rate is g times
the global one, with g from 1/8 to 16, by AdamW and by Muon. The g with the lowest sum of the two optimizers' valid
losses, with the first seed, is run with all seeds.

Claims, for each optimizer, at this one g, paired by seed. The first seed does not count, because it has chosen g: the
lowest of eight noisy losses is low by chance. Three differences need four seeds (`--only rates --seeds 1 2 3 4`).

- the valid loss with multipliers - that without < -2 standard errors.

Reported: g of each optimizer alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from examples.paper import plots
from examples.paper.arms import ALL, NAMES, NONE, OPTIMIZERS
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import estimate, verdict
from examples.paper.setting import Setting

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors g of the multipliers' learning rate."""
ERRORS = 2.0
"""Number of standard errors by which the loss must be lower."""


def swept(setting: Setting, optimizer: str) -> dict[float, Arm]:
    """Return the arms with multipliers by g."""
    lr, _ = setting.rates[optimizer]
    arms = {g: {**ALL[optimizer].overrides, "multipliers.lr": g * lr} for g in FACTORS}
    # At g = 1 the key is left out, so that the runs are those of the headline.
    return {g: ALL[optimizer] if g == 1 else Arm(f"{optimizer}, multipliers' lr x {g:g}", arms[g]) for g in FACTORS}


def first_losses(results: Results, optimizer: str) -> Mapping[float, float]:
    """Return the valid loss with the first seed by g."""
    return {g: results.first_loss(arm) for g, arm in swept(results.setting, optimizer).items()}


def chosen(results: Results) -> float:
    """Return the g with the lowest sum of the two losses."""
    adamw, muon = (first_losses(results, optimizer) for optimizer in OPTIMIZERS)
    return min(FACTORS, key=lambda g: adamw[g] + muon[g])


def compare(results: Results, optimizer: str) -> Measurement:
    """Measure the paired difference of the valid loss at the chosen g, with multipliers - without, without the first
    seed.

    Raises:
        NotRun: runs are missing, or there is one seed.
    """
    g, others = chosen(results), results.later_seeds()
    gap = others.gap("valid", NONE[optimizer], swept(results.setting, optimizer)[g])
    without = estimate(others.valid(NONE[optimizer])).mean
    note = f"{100 * gap.mean / without:+.2f} % of {without:.4f}; g = {g:g}{end_of_range(g)}"
    return Measurement(gap, verdict(gap.mean < -ERRORS * gap.error, gap), note, "nats")


def best_of(results: Results, optimizer: str) -> Measurement:
    """Report the losses by g with the first seed, minus the loss without multipliers."""
    losses = first_losses(results, optimizer)
    without = results.first_loss(NONE[optimizer])
    gaps = ", ".join(f"{g:g}: {loss - without:+.3f}" for g, loss in losses.items())
    g = min(losses, key=lambda each: losses[each])
    return Measurement(None, "reported", f"best g = {g:g}{end_of_range(g)}; first seed, with - without by g: {gaps}")


def end_of_range(g: float) -> str:
    """Return a mark for a g at an end of the range."""
    return " (end of the range)" if g in (FACTORS[0], FACTORS[-1]) else ""


def _claim(optimizer: str) -> Claim:
    return Claim(
        f"{NAMES[optimizer]}: multipliers at one learning rate for both optimizers are better than none",
        f"paired difference of the valid loss < -{ERRORS:g} SE, without the seed that chose the rate",
        lambda results: compare(results, optimizer),
    )


def _report(optimizer: str) -> Claim:
    return Claim(
        f"{NAMES[optimizer]}: the multipliers' learning rate / the global one",
        "none",
        lambda results: best_of(results, optimizer),
    )


def plot(results: Results, file: Path) -> None:
    """Draw the loss over g with the first seed, minus the loss without multipliers; dots are the other seeds of the
    chosen g."""
    drawn = False
    with plots.figure(file, 1, 1, width=6.0) as (panel,):
        for optimizer in OPTIMIZERS:
            with contextlib.suppress(NotRun):
                without = results.first_loss(NONE[optimizer])
                losses = first_losses(results, optimizer)
                gaps = [loss - without for loss in losses.values()]
                (line,) = panel.plot(list(losses), gaps, label=f"{NAMES[optimizer]}, first seed")
                drawn = True
                g = chosen(results)
                gap = results.later_seeds().gap("valid", NONE[optimizer], swept(results.setting, optimizer)[g])
                panel.scatter([g] * len(gap.values), gap.values, color=line.get_color(), s=16)
        if not drawn:
            raise NotRun("no sweep is complete")
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.set(xscale="log", xlabel="multipliers' learning rate / the global one")
        panel.set(ylabel="valid loss, with - without multipliers (nats)")
        panel.legend()


EXPERIMENT = Experiment(
    "rates",
    "Learning rate of the multipliers",
    [*(_claim(name) for name in OPTIMIZERS), *(_report(name) for name in OPTIMIZERS)],
    lambda setting: [*NONE.values(), *(each for name in OPTIMIZERS for each in swept(setting, name).values())],
    plot,
    decided=lambda results: [
        *NONE.values(),
        *(swept(results.setting, name)[chosen(results)] for name in OPTIMIZERS),
    ],
    seeds=1,
    package=False,
    losses_only=True,
)
