"""E6: two multipliers of which only the product matters drift apart, unless weight decay holds them (Fig. 4a).

Paper: without weight decay on multipliers the ratio |r_Q| / |r_K| of single pairs drifts by orders of magnitude while
their product stays; with decay it does not. A pair (a, b) may become (t a, b / t) without any change of the function:
rows of Q against rows of K (by rotary pair and group), rows of V against columns of the output projection (by group),
rows of up against columns of down.

Three parts, by AdamW with placement `all`. R = a / b, and "lr x wd" is the multipliers' learning rate x weight decay.

(i) The logits do not change along these symmetries. Not a run but a test, in float64:
`test_the_logits_do_not_change_along_a_symmetry_of_multipliers` in tests/models/test_llama.py.

(ii) A planted ratio: multipliers of up/down and of Q/K start at R = 16 (a = 4, b = 1/4; the weights are not divided by
them, and the two cancel, so that the model begins with the function of a run from ones). Weight decay shrinks a and b
alike, and gradients restore the product by steps that are as large for a as for b, hence d ln R / d step = -2 lr wd
tanh(ln R / 2). What a run learns about the product moves ln R too, by about -tanh(ln R / 2) of the product's logarithm,
and it does so without decay as well. What decay does is therefore the difference to the run at 0. Claims, from the mean
of ln R over the pairs of a layer, after the last step, for both symmetries:

- lr x wd = 2e-4 and 1e-3: the difference to the run at 0 is the change by this equation within 25 %.
- lr x wd = 8e-6 (the default decay of 2e-3): ln R is unmoved, that is, the difference to the run at 0 is below 25 % of
  what the equation gives at 2e-4, the smallest effect that is claimed.
- lr x wd = 0: ln R is unmoved, that is, its change from the start is below the same bound.
- The training loss at 8e-6, 2e-4 and 1e-3 is that at 0 within 2 standard errors, which must be able to show 0.3 % of
  the loss (the smallest effect of multipliers that is expected).

(iii) Natural drift: multipliers start at 1, their learning rate is 1e-2, and a run has twice the steps; fp32 and bf16,
implementation `layer`, decay 0 and the default 2e-3. Claim against the paper, which expects the opposite: without
decay, the standard deviation of log10 R over a layer's pairs stays below that of log10 (a b), for each of the three
symmetries, at every quarter of the run, in fp32 and in bf16. (Two multipliers that start equal get equal gradients, and
Adam moves them together.) All deviations at the end are reported.

EXPERIMENTS.md leaves open what "unmoved" and "within SE" are; it is said here. With one seed, standard errors are over
layers, and those of losses over the order of the data.

Cost: one seed. Four runs of part (ii) as long as the others of R1, 4 core-minutes each, and four of part (iii) twice as
long: 16 + 32 = 48 core-minutes on a CPU with bf16 instructions. On others the two bf16 runs take many times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import plots
from examples.paper.brownian import learning_rates
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm, nested
from examples.paper.matrices import log_pairs
from examples.paper.paired import Estimate, equal, estimate, over_seeds, verdict
from examples.paper.setting import Setting
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.monitor.names import key
from megamult.monitor.symmetries import Pairs
from megamult.optim.config import OptimizerConfig

RATIO = 16.0
"""Ratio that is planted."""
PLANTED = ("up_down", "q_k")
SYMMETRIES = ("up_down", "q_k", "v_out")
UNMOVED = (0.0, 8e-6)
"""lr x wd at which the ratio must stay."""
FOLLOWING = (2e-4, 1e-3)
"""lr x wd at which the ratio must follow the equation."""
TOLERANCE = 0.25
"""Largest deviation of a change from the predicted change, as a part of it."""
PART_OF_LOSS = 0.003
"""Part of the loss that the comparison of losses must be able to show."""

DTYPES = ("fp32", "bf16")
DRIFT_LR = 1e-2
DRIFT_DECAYS = (0.0, 2e-3)
LONGER = 2
"""Length of the runs of part (iii), in runs of the setting."""
QUARTERS = 4
"""Number of checkpoints of part (iii) at which the deviations are compared."""

EVERY = 50
"""Steps between the values of ln R that are recorded."""


def planted(setting: Setting, product: float) -> Arm:
    """Return the runs of part (ii) at one lr x wd."""
    half = math.sqrt(RATIO)
    return Arm(
        f"adamw, R = {RATIO:g}, lr x wd = {product:g}",
        {
            "optimizer.name": "adamw",
            "multipliers.initial": {
                "up": {"row": half},
                "down": {"col": 1 / half},
                "q": {"row": half},
                "k": {"row": 1 / half},
            },
            # Undivided: the weights keep their scale, and the factors cancel in the function.
            "multipliers.divide_weights": False,
            "multipliers.weight_decay": product / setting.rates["adamw"][0],
            "monitor.every": EVERY,
        },
    )


def drift_steps(setting: Setting) -> list[int]:
    """Return the steps of part (iii) at which the deviations are compared."""
    steps = LONGER * setting.steps
    return [steps * quarter // QUARTERS for quarter in range(1, QUARTERS + 1)]


def drifting(setting: Setting, dtype: str, decay: float) -> Arm:
    """Return the runs of part (iii) with one dtype and one decay."""
    first, *_, last = drift_steps(setting)
    return Arm(
        f"adamw, drift in {dtype}, decay {decay:g}",
        {
            "optimizer.name": "adamw",
            "multipliers.implementation": "layer",
            "multipliers.lr": DRIFT_LR,
            "multipliers.weight_decay": decay,
            "train.dtype": dtype,
            "train.steps": last,
            "checkpoint.save_every": first,
            "checkpoint.keep_every": first,
        },
    )


def predicted(results: Results, product: float) -> list[float]:
    """Return ln R after each step by the equation, from ln RATIO at the start."""
    arm = planted(results.setting, product)
    sections = nested(results.setting.configuration(arm.overrides))
    rates = learning_rates(OptimizerConfig.of(sections["optimizer"]), results.setting.steps)
    decay, value, found = sections["multipliers"]["weight_decay"], math.log(RATIO), []
    for lr in rates:
        value -= 2 * lr * decay * math.tanh(value / 2)
        found.append(value)
    return found


def layers(results: Results, product: float, seed: int, symmetry: str) -> list[dict[int, float]]:
    """Return the mean of ln R over the pairs of each layer, by step.

    Raises:
        NotRun: the run is not complete, or has no value after its last step.
    """
    arm = planted(results.setting, product)
    count = results.run(arm, seed).configuration["model.num_layers"]
    found = [results.series(arm, seed, key("imbalance_mean", symmetry, layer)) for layer in range(count)]
    if any(results.setting.steps not in each for each in found):
        raise NotRun(f"{arm.name}, seed {seed}: ln R of the last step is not recorded")
    return found


def changes(results: Results, product: float, symmetry: str, over: float) -> Estimate:
    """Return what decay changes in ln R at the end, divided by the predicted change at lr x wd = `over`.

    It is the difference to the run of the same seed without decay. For the run without decay itself it is the change
    from the start.
    """
    start, steps = math.log(RATIO), results.setting.steps
    expected = predicted(results, over)[-1] - start

    def moved(seed: int) -> list[float]:
        ends = [each[steps] for each in layers(results, product, seed, symmetry)]
        if not product:
            return [(end - start) / expected for end in ends]
        without = [each[steps] for each in layers(results, 0.0, seed, symmetry)]
        return [(end - other) / expected for end, other in zip(ends, without, strict=True)]

    return over_seeds([moved(seed) for seed in results.seeds])


def _worst(found: dict[str, Estimate], distance: Callable[[Estimate], float]) -> tuple[str, Estimate, Estimate]:
    """Return the name and figure with the smallest distance to its bound, and this distance with its error."""
    name = min(found, key=lambda each: distance(found[each]))
    margin = distance(found[name])
    return name, found[name], Estimate(margin, found[name].error, ())


def ratio_moves(results: Results, product: float, expected: float) -> Measurement:
    """Measure the change of ln R by decay (:func:`changes`) as a part of the predicted one. It must be near `expected`,
    0 or 1; the figure is that of the symmetry which is farther from it."""
    over = product if expected else FOLLOWING[0]
    found = {symmetry: changes(results, product, symmetry, over) for symmetry in PLANTED}
    _, figure, margin = _worst(found, lambda each: TOLERANCE - abs(each.mean - expected))
    each = ", ".join(f"{symmetry} {value.mean:.3f}" for symmetry, value in found.items())
    note = results.note("layers", f"change / predicted change{'' if expected else f' at {over:g}'}: {each}")
    return Measurement(figure, verdict(margin.mean >= 0, margin), note)


def loss_stays(results: Results) -> Measurement:
    """Measure the differences of the training loss to lr x wd = 0. The figure is the one that decides."""
    without = planted(results.setting, UNMOVED[0])
    gaps = {
        product: results.gap("train", without, planted(results.setting, product))
        for product in (*UNMOVED[1:], *FOLLOWING)
    }
    effect = PART_OF_LOSS * estimate(results.train(without)).mean
    verdicts = {product: equal(gap, effect) for product, gap in gaps.items()}
    # One unequal loss decides, and then one that is unknown.
    decisive = max(gaps, key=lambda each: (_ORDER.index(verdicts[each]), abs(gaps[each].mean)))
    each = ", ".join(f"{product:g}: {gap.mean:+.4f}" for product, gap in gaps.items())
    note = results.note("the order of the data", f"at {decisive:g}", f"by lr x wd: {each}")
    return Measurement(gaps[decisive], verdicts[decisive], note, "nats")


_ORDER = ("reproduced", "not resolved", "not reproduced")
"""Verdicts on parts of a claim, of which the last decides."""


@lru_cache(maxsize=64)
def _pairs(path: Path) -> dict[str, list[Pairs]]:
    return log_pairs(SavedCheckpoint(path))


def deviations(results: Results, arm: Arm, seed: int, step: int, symmetry: str) -> list[tuple[float, float]]:
    """Return the standard deviations of log10 R and of log10 (a b) over the pairs of each layer."""
    logs = _pairs(results.checkpoint(arm, seed, step).path)[symmetry]
    return [
        (float((a - b).std(correction=0)) / math.log(10), float((a + b).std(correction=0)) / math.log(10))
        for a, b in logs
    ]


def ratio_spreads_less(results: Results, dtype: str) -> Measurement:
    """Measure sd(log10 R) / sd(log10 a b) without decay, mean over layers, at the symmetry and quarter where it is
    largest."""
    arm = drifting(results.setting, dtype, 0.0)
    found = {
        f"{symmetry} at step {step}": over_seeds(
            [
                [ratio / product for ratio, product in deviations(results, arm, seed, step, symmetry)]
                for seed in results.seeds
            ]
        )
        for symmetry in SYMMETRIES
        for step in drift_steps(results.setting)
    }
    name, figure, margin = _worst(found, lambda each: 1 - each.mean)
    return Measurement(figure, verdict(margin.mean > 0, margin), results.note("layers", f"largest: {name}"))


def all_deviations(results: Results, dtype: str) -> Measurement:
    """Report the deviations at the end, mean over layers and seeds, without and with decay."""
    last, words = drift_steps(results.setting)[-1], []
    for decay in DRIFT_DECAYS:
        arm = drifting(results.setting, dtype, decay)
        for symmetry in SYMMETRIES:
            each = [deviations(results, arm, seed, last, symmetry) for seed in results.seeds]
            ratio, product = np.mean(each, axis=(0, 1))
            words.append(f"{symmetry} {ratio:.4f} / {product:.4f}")
        words[-len(SYMMETRIES)] = f"decay {decay:g}: {words[-len(SYMMETRIES)]}"
    return Measurement(None, "reported", "; ".join(words))


def _moves(product: float, expected: float) -> Claim:
    follows = "follows -2 lr wd tanh(ln R / 2)" if expected else "does not move"
    change = "difference of ln R to the run without decay" if product else "change of ln R from the start"
    return Claim(
        f"(ii) A planted ratio {follows} at lr x wd = {product:g}",
        f"{change} within {100 * TOLERANCE:g} % of the predicted change"
        if expected
        else f"{change} below {100 * TOLERANCE:g} % of the predicted change at {FOLLOWING[0]:g}",
        lambda results: ratio_moves(results, product, expected),
    )


def _spreads(dtype: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            f"(iii) Against the paper, {dtype}: without decay, ratios spread less than products",
            "sd(log10 a/b) < sd(log10 ab) for each symmetry, at every quarter of the run",
            lambda results: ratio_spreads_less(results, dtype),
        ),
        Claim(
            f"(iii) {dtype}: sd(log10 a/b) / sd(log10 ab) at the end",
            "none",
            lambda results: all_deviations(results, dtype),
        ),
    )


CLAIMS = (
    *(_moves(product, 0.0) for product in UNMOVED),
    *(_moves(product, 1.0) for product in FOLLOWING),
    Claim(
        "(ii) Decay of the ratio does not change the loss",
        "training loss at each lr x wd within 2 SE of that at 0",
        loss_stays,
    ),
    *(claim for dtype in DTYPES for claim in _spreads(dtype)),
)


def plot(results: Results, file: Path) -> None:
    """Draw ln R over the steps, measured (up/down, mean over layers and seeds) and by the equation, and, for each
    symmetry, log10 R over log10 (a b) of all pairs at the end, without and with decay, in fp32, of the first seed."""
    seed, last = results.seeds[0], drift_steps(results.setting)[-1]
    with plots.figure(file, 1, 1 + len(SYMMETRIES)) as (curves, *scatters):
        drawn = [_curve(results, product, curves) for product in (*UNMOVED, *FOLLOWING)]
        for panel, symmetry in zip(scatters, SYMMETRIES, strict=True):
            for decay, colour in zip(DRIFT_DECAYS, ("tab:red", "tab:blue"), strict=True):
                try:
                    path = results.checkpoint(drifting(results.setting, DTYPES[0], decay), seed, last).path
                except NotRun:
                    continue
                products, ratios = _decades(_pairs(path)[symmetry])
                panel.scatter(products, ratios, s=4, alpha=0.5, color=colour, label=f"decay {decay:g}")
                drawn.append(True)
            panel.axis("equal")
            panel.set(title=symmetry, xlabel="log10 |a b|", ylabel="log10 |a / b|")
        if not any(drawn):
            raise NotRun("no arm is complete")
        curves.set(xlabel="step", ylabel="ln R of up and down (dashed: predicted)")
        for panel in (curves, scatters[0]):
            if panel.has_data():
                panel.legend(fontsize=7)


def _curve(results: Results, product: float, panel: Any) -> bool:
    """Draw ln R at one lr x wd, and return whether its runs are there."""
    try:
        found = [each for seed in results.seeds for each in layers(results, product, seed, PLANTED[0])]
    except NotRun:
        return False
    steps = sorted(found[0])
    means = [float(np.mean([each[step] for each in found])) for step in steps]
    (line,) = panel.plot([0, *steps], [math.log(RATIO), *means], label=f"lr x wd = {product:g}")
    panel.plot(
        [0, *range(1, results.setting.steps + 1)],
        [math.log(RATIO), *predicted(results, product)],
        "--",
        color=line.get_color(),
    )
    return True


def _decades(logs: Sequence[Pairs]) -> tuple[np.ndarray, np.ndarray]:
    """Return log10 of the products and of the ratios of all layers."""
    products, ratios = (np.concatenate([(a + sign * b).numpy() for a, b in logs]) for sign in (1, -1))
    return products / math.log(10), ratios / math.log(10)


EXPERIMENT = Experiment(
    "E6",
    "Multipliers of which only the product matters",
    CLAIMS,
    lambda setting: [
        *(planted(setting, product) for product in (*UNMOVED, *FOLLOWING)),
        *(drifting(setting, dtype, decay) for dtype in DTYPES for decay in DRIFT_DECAYS),
    ],
    plot,
    seeds=1,
    package=False,
)
