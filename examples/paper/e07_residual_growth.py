"""E7: outputs of the blocks grow without weight decay on multipliers, because norms leave their scale free (Figs. 4b,
10).

Paper: everything that a norm reads may grow together without any change of the function. With multipliers and without
decay on them, the RMS of what the blocks add to the residual stream grows through the run; with decay it does not.

Runs: R1m, a deeper and narrower model than R1's (8 layers, hidden size 128, ffn 352; 2.5M parameters), by AdamW,
placement `all`, multipliers' learning rate 1e-2, 1,500 steps with a constant learning rate after the warm-up. Weight
decay of the multipliers: 0, the default 2e-3, and 0.1.

Claims. The slope is that of ln RMS over the step, fitted by least squares over the last 60 % of the steps, from the RMS
of the outputs of attention and MLP every 10 steps; its mean over these two and over all layers counts.

- Decay 0: the slope is above 0.
- Decay 0.1: the slope is at most half of that at 0, paired by seed.
- Decay 2e-3: the slope is that at 0 within 2 standard errors, which must be smaller than the growth at 0. Here lr x wd
  x steps = 0.03, so the default decay does nothing in this run.

The slopes of attention, MLP and the residual stream are reported. With one seed, standard errors are over layers, which
are not independent of each other.

Cost: three runs for one seed. A step of R1m costs about as much as one of R1, which takes 4 core-minutes for 600 steps:
10 core-minutes a run, 30 for one seed, 60 for two (the default).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from examples.paper import plots
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, equal, over_seeds, slope, verdict
from megamult.monitor.names import key

LAYERS, STEPS = 8, 1500
EVERY = 10
"""Steps between the values of the RMS."""
FITTED = 0.6
"""Part of the steps, the last ones, over which slopes are fitted."""
HALVED = 0.5
"""Largest part of the slope that may remain at the largest decay."""
NONE, DEFAULT, LARGE = 0.0, 2e-3, 0.1
DECAYS = (NONE, DEFAULT, LARGE)
"""Weight decays of the multipliers."""

OUTPUTS = ("attention_output_rms", "mlp_output_rms")
"""Figures of what the blocks add to the residual stream."""
STREAM = "residual_rms"

UNIT = "per 1,000 steps"
UNIT_STEPS = 1000


def arm(decay: float) -> Arm:
    """Return the runs at one weight decay of the multipliers."""
    return Arm(
        f"adamw, 8 layers, multipliers' decay {decay:g}",
        {
            "optimizer.name": "adamw",
            "model.num_layers": LAYERS,
            "model.hidden_size": 128,
            "model.num_attention_heads": 4,
            "model.num_query_groups": 2,
            "model.ffn_hidden_size": 352,
            "train.steps": STEPS,
            "train.eval_every": STEPS // 3,
            "optimizer.decay_steps": 0,
            "multipliers.lr": 1e-2,
            "multipliers.weight_decay": decay,
            "monitor.every": EVERY,
            "monitor.updates": False,
            "checkpoint.save_every": STEPS // 3,
            "checkpoint.keep_every": 0,
        },
    )


def logarithms(results: Results, decay: float, seed: int, metric: str, layer: int) -> dict[int, float]:
    """Return the logarithm of an RMS of one layer by step.

    Raises:
        NotRun: the run is not complete, or has not recorded the figure every EVERY steps.
    """
    found = results.series(arm(decay), seed, key(metric, layer=layer))
    if sorted(found) != list(range(EVERY, STEPS + 1, EVERY)):
        raise NotRun(f"{arm(decay).name}, seed {seed}: {metric} is not recorded every {EVERY} steps")
    return {step: math.log(value) for step, value in found.items()}


def slopes(results: Results, decay: float, seed: int, metrics: tuple[str, ...]) -> list[float]:
    """Return the slope of ln RMS per UNIT_STEPS steps of each layer, mean over the metrics."""
    fitted = [step for step in range(EVERY, STEPS + 1, EVERY) if step > (1 - FITTED) * STEPS]
    of_layers = []
    for layer in range(LAYERS):
        each = [logarithms(results, decay, seed, metric, layer) for metric in metrics]
        of_layers.append(
            UNIT_STEPS * float(np.mean([slope(fitted, [found[step] for step in fitted]).value for found in each]))
        )
    return of_layers


def growth(results: Results, decay: float, metrics: tuple[str, ...] = OUTPUTS) -> Estimate:
    """Return the mean slope at one decay."""
    return over_seeds([slopes(results, decay, seed, metrics) for seed in results.seeds])


def difference(results: Results, decay: float) -> Estimate:
    """Return the paired difference of the slopes, decay - none."""
    return over_seeds(
        [
            [b - a for a, b in zip(*(slopes(results, each, seed, OUTPUTS) for each in (NONE, decay)), strict=True)]
            for seed in results.seeds
        ]
    )


def grows(results: Results) -> Measurement:
    """Measure the slope without decay."""
    found = growth(results, NONE)
    return Measurement(found, verdict(found.mean > 0, found), results.note("layers"), UNIT)


def is_halved(results: Results) -> Measurement:
    """Measure by how much the largest decay lowers the slope."""
    without, with_it, gap = growth(results, NONE), growth(results, LARGE), difference(results, LARGE)
    holds = without.mean > 0 and with_it.mean <= HALVED * without.mean
    note = results.note("layers", f"{without.mean:.4g} -> {with_it.mean:.4g}")
    return Measurement(gap, verdict(holds, gap), note, UNIT)


def default_does_nothing(results: Results) -> Measurement:
    """Measure by how much the default decay lowers the slope."""
    without, gap = growth(results, NONE), difference(results, DEFAULT)
    note = results.note("layers", f"{without.mean:.4g} -> {growth(results, DEFAULT).mean:.4g}")
    return Measurement(gap, equal(gap, without.mean), note, UNIT)


def apart(results: Results) -> Measurement:
    """Report the slopes of attention, MLP and residual stream by decay."""
    words = []
    for decay in DECAYS:
        each = ", ".join(
            f"{metric.removesuffix('_rms')} {growth(results, decay, (metric,)).mean:+.3f}"
            for metric in (*OUTPUTS, STREAM)
        )
        words.append(f"decay {decay:g}: {each}")
    return Measurement(None, "reported", f"{'; '.join(words)} {UNIT}")


CLAIMS = (
    Claim("Without decay of the multipliers, outputs of the blocks grow", "slope of ln RMS > 0", grows),
    Claim(
        f"Decay {LARGE:g} of the multipliers slows the growth",
        f"slope at most {HALVED:g} times that without decay",
        is_halved,
    ),
    Claim(
        f"The default decay {DEFAULT:g} does nothing in this run",
        "slope within 2 SE of that without decay",
        default_does_nothing,
    ),
    Claim("Slopes of attention, MLP and residual stream", "none", apart),
)


def plot(results: Results, file: Path) -> None:
    """Draw ln RMS of the outputs of attention and MLP over the steps: median and quartiles over layers and seeds."""
    with plots.figure(file, 1, len(OUTPUTS)) as panels:
        drawn = False
        for decay in DECAYS:
            for panel, metric in zip(panels, OUTPUTS, strict=True):
                try:
                    lines = np.asarray(
                        [
                            list(logarithms(results, decay, seed, metric, layer).values())
                            for seed in results.seeds
                            for layer in range(LAYERS)
                        ]
                    )
                except NotRun:
                    continue
                drawn = True
                low, middle, high = np.percentile(lines, (25, 50, 75), axis=0)
                steps = range(EVERY, STEPS + 1, EVERY)
                (line,) = panel.plot(steps, middle, label=f"decay {decay:g}")
                panel.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if not drawn:
            raise NotRun("no arm is complete")
        for panel, metric in zip(panels, OUTPUTS, strict=True):
            panel.axvline((1 - FITTED) * STEPS, color="black", linestyle=":", linewidth=0.8)
            panel.set(xlabel="step (fitted after the line)", ylabel=f"ln RMS, {metric.partition('_')[0]} output")
        panels[0].legend()


EXPERIMENT = Experiment(
    "E7",
    "Growth of the blocks' outputs",
    CLAIMS,
    lambda setting: [arm(decay) for decay in DECAYS],
    plot,
    seeds=2,
    package=False,
)
