"""E10: do multipliers improve a baseline whose learning rates are tuned by role? (Fig. 7, a part of it).

Paper: with scales of learning rates, of decays and of the forward pass tuned (NONE, LR, LR + WD, FULL), runs with
multipliers are always better than those without, by Adam and by Muon, and NONE without multipliers is the worst.

Probes find the tuned values: runs without multipliers, of half the steps, with the first seed. Each changes one thing
by a factor f of 1/4, 1/2, 2 or 4: the learning rate of all roles, or that of one group (embedding, head, attention,
MLP, norms). The f with the lowest valid loss is chosen, 1 included. They decide two tunings, which are run with all
seeds, with and without multipliers:

- `NONE`: the f of all roles, that is, a tuned global learning rate.
- `LR`: the f of each group, at the setting's global rate. The groups are tuned one at a time, not together.

With --full also `LRWD`: the weight decays of the groups too (norms have none), from probes in the same manner. The
learning rate of the multipliers is the global one, and tuned runs have the same factors with and without multipliers.
Decay is multiplied by the learning rate: a factor of a group's rate also changes how fast its weights decay.

Claims, for each optimizer, paired by seed, from valid losses:

- NONE, LR (and LRWD): with - without multipliers < -2 standard errors.
- LR without - NONE without < -2 standard errors: tuning helps, so that these are tuned baselines.
- With --full: |LRWD - LR| with multipliers is at most half of that without. The paper: multipliers make the tuning of
  decays superfluous.

Reported: LR - NONE with multipliers, and the factors that were chosen. Not run: FULL. Its runs with multipliers would
start scalars of the head and of whole matrices at the tuned values, beside the row and column multipliers of `all`:
another placement than that of the other runs with multipliers. Known weaknesses: the best rate of half a run may not be
that of a whole one, and one seed decides. By AdamW at R1 the headline's paired differences have a standard deviation of
0.044 nats.

Runs: for each optimizer 25 probes (one without a change, and four factors of six things) of 2 core-minutes, and, with
three seeds, 12 whole runs of 4: 200 core-minutes for both. Whole runs in which no factor is changed are those of the
headline. --full takes all seeds of the probes too, though only the first decides, and has 16 more probes and 6 more
whole runs for each optimizer: with three seeds 246 probes and 36 whole runs, 11 core-hours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import plots
from examples.paper.arms import KINDS, NAMES, OPTIMIZERS
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.paired import Estimate, estimate, paired, verdict
from examples.paper.setting import Setting

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
GROUPS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "head": ("head",),
    "attention": ("q", "k", "v", "attention_out"),
    "MLP": ("gate", "up", "down"),
    "norms": ("norm", "final_norm"),
}
"""Roles that are tuned together."""

Knob = tuple[str, str]
"""What one factor changes: ("lr", group), ("weight_decay", group), or :data:`GLOBAL`."""
GLOBAL: Knob = ("lr", "all")
RATES: tuple[Knob, ...] = tuple(("lr", group) for group in GROUPS)
DECAYS: tuple[Knob, ...] = tuple(("weight_decay", group) for group in GROUPS if group != "norms")
TUNINGS: dict[str, tuple[Knob, ...]] = {"NONE": (GLOBAL,), "LR": RATES, "LRWD": RATES + DECAYS}
"""Knobs that each tuning chooses."""

ERRORS = 2.0
"""Number of standard errors by which a loss must be lower."""
PART = 0.5
"""Largest part of the effect of tuning decays that may remain with multipliers."""
SHORTER = 2
"""Number of steps of a run, divided by those of a probe."""


def tuned(setting: Setting, optimizer: str, factors: Mapping[Knob, float]) -> dict[str, Any]:
    """Return the keys of runs with these factors. Factors of 1 leave no trace, so that such runs are shared."""
    of_roles: dict[str, dict[str, float]] = {"lr": {}, "weight_decay": {}}
    for (what, group), factor in factors.items():
        if (what, group) != GLOBAL and factor != 1:
            of_roles[what] |= dict.fromkeys(GROUPS[group], factor)
    return {
        "optimizer.name": optimizer,
        "optimizer.lr": setting.rates[optimizer][0] * factors.get(GLOBAL, 1.0),
        **{f"optimizer.{what}_factors": found for what, found in of_roles.items() if found},
    }


def probe(setting: Setting, optimizer: str, knob: Knob, factor: float) -> Arm:
    """Return the short run in which one thing is changed. Those of a factor of 1 are all the same."""
    return Arm(
        f"{optimizer}, probe, {knob[0]} of {knob[1]} x {factor:g}" if factor != 1 else f"{optimizer}, probe",
        {
            **tuned(setting, optimizer, {knob: factor}),
            **KINDS["none"],
            "train.steps": setting.steps // SHORTER,
            "optimizer.warmup_steps": setting.warmup_steps // SHORTER,
            "optimizer.decay_steps": (setting.steps - setting.constant_end) // SHORTER,
            "train.eval_every": 0,  # only after the last step
            "checkpoint.keep_every": 0,
        },
    )


def chosen(results: Results, optimizer: str, tuning: str) -> dict[Knob, float]:
    """Return the factors of a tuning.

    Raises:
        NotRun: probes are missing.
    """
    found = {}
    for knob in TUNINGS[tuning]:
        losses = {factor: results.first_loss(probe(results.setting, optimizer, knob, factor)) for factor in FACTORS}
        found[knob] = min(losses, key=losses.__getitem__)
    return found


def arm(results: Results, optimizer: str, tuning: str, with_multipliers: bool) -> Arm:
    """Return the runs of a tuning.

    Raises:
        NotRun: probes are missing.
    """
    keys = tuned(results.setting, optimizer, chosen(results, optimizer, tuning))
    name = f"{optimizer}, {tuning}, {'with' if with_multipliers else 'without'} multipliers"
    return Arm(name, keys | KINDS["free" if with_multipliers else "none"])


def gap(results: Results, optimizer: str, without: tuple[str, bool], with_it: tuple[str, bool]) -> Estimate:
    """Return the paired difference of the valid loss of two (tuning, with multipliers), the second minus the first."""
    first, second = (results.valid(arm(results, optimizer, *each)) for each in (without, with_it))
    return paired(first, second)


def improves(results: Results, optimizer: str, without: tuple[str, bool], with_it: tuple[str, bool]) -> Measurement:
    """Measure a paired difference that must be below zero."""
    found = gap(results, optimizer, without, with_it)
    before = np.mean(results.valid(arm(results, optimizer, *without)))
    note = f"{100 * found.mean / before:+.2f} % of {before:.4f}"
    return Measurement(found, verdict(found.mean < -ERRORS * found.error, found), note, "nats")


def tuning_with(results: Results, optimizer: str) -> Measurement:
    """Report what tuning the learning rates gives with multipliers."""
    found = gap(results, optimizer, ("NONE", True), ("LR", True))
    without = gap(results, optimizer, ("NONE", False), ("LR", False))
    return Measurement(found, "reported", f"without multipliers {without.mean:+.4f}", "nats")


def decays_matter_less(results: Results, optimizer: str) -> Measurement:
    """Measure how far the effect of tuning decays with multipliers is below PART of that without."""
    without, with_them = (gap(results, optimizer, ("LR", each), ("LRWD", each)) for each in (False, True))
    # Over the seeds, with the signs of the means: the mean of the margins is then the margin of the means' sizes.
    first, second = np.sign(without.mean), np.sign(with_them.mean)
    margin = estimate([PART * first * a - second * b for a, b in zip(without.values, with_them.values, strict=True)])
    note = f"LRWD - LR: without {without.mean:+.4f}, with {with_them.mean:+.4f}"
    return Measurement(margin, verdict(margin.mean >= 0, margin), note, "nats")


def factors_of(results: Results, optimizer: str) -> Measurement:
    """Report the factors that were chosen."""
    notes = []
    for tuning in TUNINGS:
        with contextlib.suppress(NotRun):
            found = chosen(results, optimizer, tuning)
            notes.append(f"{tuning}: " + ", ".join(f"{' of '.join(knob)} x {found[knob]:g}" for knob in found))
    if not notes:
        raise NotRun(f"{optimizer}: probes are missing")
    return Measurement(None, "reported", "; ".join(notes))


def _multipliers_claim(optimizer: str, tuning: str) -> Claim:
    return Claim(
        f"{NAMES[optimizer]}, {tuning}: multipliers improve it{' (--full)' if tuning == 'LRWD' else ''}",
        f"paired difference of the valid loss < -{ERRORS:g} SE",
        lambda results: improves(results, optimizer, (tuning, False), (tuning, True)),
    )


def _claims(optimizer: str) -> list[Claim]:
    name = NAMES[optimizer]
    return [
        *(_multipliers_claim(optimizer, tuning) for tuning in TUNINGS),
        Claim(
            f"{name}: tuned learning rates of groups improve the baseline, LR - NONE without multipliers",
            f"paired difference of the valid loss < -{ERRORS:g} SE",
            lambda results: improves(results, optimizer, ("NONE", False), ("LR", False)),
        ),
        Claim(
            f"{name}: tuning decays does less with multipliers (--full)",
            f"{PART:g} |LRWD - LR| without - |LRWD - LR| with >= 0",
            lambda results: decays_matter_less(results, optimizer),
        ),
        Claim(f"{name}: LR - NONE with multipliers", "none", lambda results: tuning_with(results, optimizer)),
        Claim(f"{name}: factors that were chosen", "none", lambda results: factors_of(results, optimizer)),
    ]


def plot(results: Results, file: Path) -> None:
    """Draw, for each optimizer, the valid losses by tuning, a dot for each seed; and the difference of the training
    loss over the steps, with - without multipliers."""
    drawn = False
    with plots.figure(file, len(OPTIMIZERS), 2) as panels:
        for number, optimizer in enumerate(OPTIMIZERS):
            dots, over_steps = panels[2 * number : 2 * number + 2]
            for position, tuning in enumerate(TUNINGS):
                try:
                    pair = [arm(results, optimizer, tuning, each) for each in (False, True)]
                    losses = [results.valid(each) for each in pair]
                except NotRun:
                    continue
                drawn = True
                for offset, colour, values in zip((-0.12, 0.12), ("tab:gray", "tab:blue"), losses, strict=True):
                    dots.scatter([position + offset] * len(values), values, color=colour)
                try:
                    runs = [results.all_curves(each) for each in pair]
                except NotRun:
                    continue  # only final losses are kept
                steps = sorted(runs[0][0].train)
                gaps = [[b.train[step] - a.train[step] for step in steps] for a, b in zip(*runs, strict=True)]
                plots.smoothed(over_steps, steps, np.asarray(gaps), tuning)
                over_steps.legend()
            dots.set_xticks(range(len(TUNINGS)), list(TUNINGS))
            dots.set(ylabel="valid loss (nats); blue: with multipliers", title=NAMES[optimizer])
            over_steps.axhline(0.0, color="black", linewidth=0.8)
            over_steps.set(xlabel="step", ylabel="training loss, with - without (nats)")
        if not drawn:
            raise NotRun("no tuning is complete")


def _probes(setting: Setting, knobs: tuple[Knob, ...]) -> list[Arm]:
    return [probe(setting, optimizer, knob, factor) for optimizer in OPTIMIZERS for knob in knobs for factor in FACTORS]


def _decided(results: Results) -> list[Arm]:
    """Return the arms of the tunings whose probes are complete."""
    found = []
    for optimizer in OPTIMIZERS:
        for tuning in TUNINGS:
            with contextlib.suppress(NotRun):
                found += [arm(results, optimizer, tuning, each) for each in (False, True)]
    return found


EXPERIMENT = Experiment(
    "E10",
    "Tuned baselines",
    [claim for optimizer in OPTIMIZERS for claim in _claims(optimizer)],
    lambda setting: _probes(setting, (GLOBAL, *RATES)),
    plot,
    lambda setting: _probes(setting, DECAYS),
    _decided,
    seeds=1,
    package=False,
    losses_only=True,
)
