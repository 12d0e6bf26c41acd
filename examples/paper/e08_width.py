"""E8: at a constant learning rate, learned scalars fall with the width almost as muP's constants (Figs. 5 and 10).

Paper: noise and decay give matrices the same RMS at every width, so that logits and attention logits grow with the
width. Learned multipliers fall as the width grows, almost as muP prescribes (1 / d, and 1 / d^2 for Q and K together),
and keep both constant.

Three kinds of runs, by AdamW, at hidden sizes d of 64, 128, 256 and 512, with heads of 32 and the other widths in
proportion, one learning rate and one decay:

- `learned`: one multiplier per matrix of the blocks and for the embedding, and a final norm of one weight, which is the
  head's multiplier.
- `none`: no multipliers, and a final norm without weights: a learned one would be a multiplier of the head.
- `mup`: the same, and constant factors of 64 / d on the blocks' matrices and the head, with initial weights of muP's
  effective scale. Learning rates of effective weights are then those of muP too, without a change of the optimizer's.

The norms in the layers have no weights. An exponent is the slope of a logarithm over ln d. Figures are those of the
log in the last quarter of the constant stage (geometric mean); attention logits are pooled over the layers, the
logarithms of scalars averaged. With one seed the standard error is that of the fit over the widths. Claims:

- In each kind, the RMS of W does not depend on d from 128 to 512: for the role of the blocks where it depends most,
  |exponent| < ln 1.1 / ln 4, which is 10 % over this range.
- learned: |exponent| of the RMS of the logits, and of that of the attention logits, < ln 1.6 / ln 8, which is a factor
  of 1.6 over all widths.
- none: both exponents > 0.25.
- learned: the exponent of the final norm's weight is in [-1.1, -0.4], and that of s_q s_k in [-2.2, -0.8].
- learned: the scales fall less than muP's: these exponents are above -1 and -2.

Reported: muP's exponents of the logits, and the valid losses. Not run: the paper's Table 1, with a learning rate in
proportion to 1 / d. In a run of this length such weights are far from their equilibrium.

Runs: 11 for each seed (at d = 64 `mup` is `none`), of about 1.5, 3, 8 and 24 core-minutes by width, where a run of R1
takes 4: 110 core-minutes. The plain call has one seed, --full all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper import plots
from examples.paper.arms import KINDS, model_of, sizes_at
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import Arm
from examples.paper.matrices import BLOCK_ROLES
from examples.paper.paired import Estimate, exponent, paired, within
from examples.paper.setting import Setting
from megamult.models.llama.mup import at_width, mup
from megamult.monitor.names import key

WIDTHS = (64, 128, 256, 512)
BASE = WIDTHS[0]
"""Width at which muP's factors are 1."""
ARMS = ("learned", "none", "mup")

STEADY_WIDTHS = WIDTHS[1:]
"""Widths over which the RMS of W must be constant."""
STEADY_NORM = math.log(1.1) / math.log(4)
"""Largest |exponent| of the RMS of W."""
STEADY_LOGITS = math.log(1.6) / math.log(8)
"""Largest |exponent| of logits with learned scales."""
GROWTH = 0.25
"""Smallest exponent of logits without multipliers."""
SCALES = {"the head": (-1.1, -0.4), "Q and K": (-2.2, -0.8)}
"""Bounds of the exponents of learned scales."""
MUP = {"the head": -1.0, "Q and K": -2.0}
"""Exponents that muP prescribes."""
RECORDS = 20
"""Number of records in the constant stage."""

Read = Callable[[Results, str, int, int], float]
"""Function (results, kind, width, seed) that reads a figure of a run."""


def constants(setting: Setting, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a run that has muP's factors as constants in the forward pass only.

    A matrix W with a constant s has the effective weight s W. AdamW at the learning rate lr changes W by about lr in
    each element, and s W by lr s: so s is muP's factor of the learning rate, and the initial W is divided by s.

    Raises:
        ValueError: the model is no Llama model.
    """
    model = model_of(setting, sizes)
    factors = mup(model, at_width(model, BASE))
    scalars = {**factors.lr, **factors.forward}
    return {
        "multipliers.placement": dict.fromkeys(scalars, "scalar"),
        "multipliers.initial": scalars,
        "multipliers.lr_factors": dict.fromkeys(scalars, 0.0),
        "multipliers.divide_weights": False,
        "model.init_std_factors": {role: factors.init_std[role] / lr for role, lr in factors.lr.items()},
    }


def arm(setting: Setting, kind: str, width: int) -> Arm:
    """Return the runs of one kind at one width. They keep no checkpoints: what is measured is in their logs."""
    sizes = sizes_at(width)
    if kind == "learned":
        own: dict[str, Any] = {"multipliers.placement": "scalar"}
    else:
        own = KINDS["none"] if kind == "none" or width == BASE else constants(setting, sizes)
    return Arm(
        f"hidden {width}, {kind}",
        {
            "optimizer.name": "adamw",
            "model.norms": "frozen",
            "model.final_norm": "scalar" if kind == "learned" else "frozen",
            "monitor.every": max(1, setting.constant_end // RECORDS),
            "checkpoint.keep_every": 0,
            **sizes,
            **own,
        },
    )


def late(results: Results, kind: str, width: int, seed: int, name: str) -> list[float]:
    """Return the records of a figure in the last quarter of the constant stage."""
    end = results.setting.constant_end
    series = results.series(arm(results.setting, kind, width), seed, name)
    found = [value for step, value in series.items() if 0.75 * end < step <= end]
    if not found:
        raise NotRun(f"hidden {width}, {kind}, seed {seed}: no {name} between steps {0.75 * end:g} and {end}")
    return found


def figure(name: str, results: Results, kind: str, width: int, seed: int) -> float:
    """Return the geometric mean of the late records of a figure."""
    return math.exp(np.mean(np.log(late(results, kind, width, seed, name))))


def attention_logits(results: Results, kind: str, width: int, seed: int) -> float:
    """Return the RMS of the attention logits of all layers."""
    layers = range(int(results.setting.configuration({})["model.num_layers"]))
    each = [figure(key("attention_logit_rms", layer=layer), results, kind, width, seed) for layer in layers]
    return math.sqrt(np.mean(np.square(each)))


def query_key_scale(results: Results, kind: str, width: int, seed: int) -> float:
    """Return |s_q s_k|, the geometric mean over the layers."""
    logs = [np.mean(late(results, kind, width, seed, f"scalar_log_mean/{role}")) for role in ("q", "k")]
    return math.exp(sum(logs))


logits: Read = partial(figure, "logits_rms")
head_scale: Read = partial(figure, "weight_rms/final_norm")
"""|weight of the final norm|, the head's scale."""
READ_SCALES: dict[str, Read] = {"the head": head_scale, "Q and K": query_key_scale}
READ_LOGITS: dict[str, Read] = {"logits": logits, "attention logits": attention_logits}


def growth(results: Results, kind: str, read: Read, widths: Sequence[int] = WIDTHS) -> Estimate:
    """Return the exponent of a figure over the widths."""
    return exponent(widths, [[read(results, kind, width, seed) for width in widths] for seed in results.seeds])


def values(results: Results, kind: str, read: Read) -> str:
    """Return a figure at every width, with the first seed, in words."""
    return ", ".join(f"{width}: {read(results, kind, width, results.seeds[0]):.3g}" for width in WIDTHS)


def norms_are_constant(results: Results, kind: str) -> Measurement:
    """Measure the exponent of the RMS of W where it is largest."""
    found = {
        role: growth(results, kind, partial(figure, f"weight_rms/{role}"), STEADY_WIDTHS)
        for role in (*BLOCK_ROLES, "embedding", "head")
    }
    role = max(BLOCK_ROLES, key=lambda each: abs(found[each].mean))
    note = f"of {role}; {', '.join(f'{each} {found[each].mean:+.3f}' for each in found)}"
    return Measurement(found[role], within(found[role], -STEADY_NORM, STEADY_NORM), note)


def logits_grow(results: Results, kind: str, what: str, low: float, high: float) -> Measurement:
    """Measure the exponent of the RMS of logits."""
    found = growth(results, kind, READ_LOGITS[what])
    return Measurement(found, within(found, low, high), values(results, kind, READ_LOGITS[what]))


def scale_falls(results: Results, what: str, low: float, high: float) -> Measurement:
    """Measure the exponent of a learned scale."""
    found = growth(results, "learned", READ_SCALES[what])
    return Measurement(found, within(found, low, high), values(results, "learned", READ_SCALES[what]))


def with_constants(results: Results) -> Measurement:
    """Report the exponents of logits with muP's constants."""
    logit, attention = (growth(results, "mup", read) for read in READ_LOGITS.values())
    return Measurement(logit, "reported", f"attention logits {attention.mean:+.2f}")


def losses(results: Results, kind: str) -> Measurement:
    """Report the paired differences of the valid loss, learned - another kind."""
    gaps = {
        width: paired(*(results.valid(arm(results.setting, each, width)) for each in (kind, "learned")))
        for width in WIDTHS
    }
    note = ", ".join(f"{width}: {gap.mean:+.4f}" for width, gap in gaps.items())
    return Measurement(gaps[WIDTHS[-1]], "reported", f"at hidden {WIDTHS[-1]}; {note}", "nats")


def _logits_claim(kind: str, what: str, text: str, low: float, high: float, threshold: str) -> Claim:
    return Claim(f"{kind}: {text} {what}", threshold, lambda results: logits_grow(results, kind, what, low, high))


def _scale_claims(what: str) -> list[Claim]:
    low, high = SCALES[what]
    return [
        Claim(
            f"learned: the scale of {what} falls with the width",
            f"exponent in [{low:g}, {high:g}]",
            lambda results: scale_falls(results, what, low, high),
        ),
        Claim(
            f"learned: the scale of {what} falls less than muP's",
            f"exponent > {MUP[what]:g}",
            lambda results: scale_falls(results, what, MUP[what], math.inf),
        ),
    ]


def _norm_claim(kind: str) -> Claim:
    return Claim(
        f"{kind}: the RMS of the blocks' matrices does not depend on the width, {STEADY_WIDTHS[0]} to {WIDTHS[-1]}",
        f"|exponent| < {STEADY_NORM:.3f} for every role",
        lambda results: norms_are_constant(results, kind),
    )


def _loss_claim(kind: str) -> Claim:
    return Claim(f"The valid loss, learned - {kind}", "none", lambda results: losses(results, kind))


CLAIMS = (
    *(_norm_claim(kind) for kind in ARMS),
    *(
        _logits_claim(
            "learned",
            what,
            "the width hardly changes the RMS of the",
            -STEADY_LOGITS,
            STEADY_LOGITS,
            f"|exponent| < {STEADY_LOGITS:.3f}",
        )
        for what in READ_LOGITS
    ),
    *(
        _logits_claim("none", what, "the width raises the RMS of the", GROWTH, math.inf, f"exponent > {GROWTH:g}")
        for what in READ_LOGITS
    ),
    *(claim for what in SCALES for claim in _scale_claims(what)),
    Claim("muP's constants: exponents of the logits", "none", with_constants),
    *(_loss_claim(kind) for kind in ARMS[1:]),
)


def plot(results: Results, file: Path) -> None:
    """Draw over the width, with the first seed: RMS of W, RMS of logits, and learned scales beside muP's powers; and
    logits over the steps at every width."""
    seed, widths = results.seeds[0], np.asarray(WIDTHS)
    with plots.figure(file, 1, 4) as (norms, rms, scales, steps):
        for number, kind in enumerate(ARMS):
            for role, style in (("q", "-"), ("down", "--"), ("head", ":")):
                line = [figure(f"weight_rms/{role}", results, kind, width, seed) for width in WIDTHS]
                norms.plot(WIDTHS, line, style, color=f"C{number}", label=f"{kind}, {role}")
            for (what, read), style in zip(READ_LOGITS.items(), ("-", "--"), strict=True):
                line = [read(results, kind, width, seed) for width in WIDTHS]
                rms.plot(WIDTHS, line, style, color=f"C{number}", label=f"{kind}, {what}")
        for number, (what, read) in enumerate(READ_SCALES.items()):
            line = [read(results, "learned", width, seed) for width in WIDTHS]
            scales.plot(WIDTHS, line, "o-", color=f"C{number}", label=what)
            scales.plot(WIDTHS, line[0] * (widths / BASE) ** MUP[what], "k--", linewidth=0.8)
        for number, width in enumerate(WIDTHS):
            for kind, style in (("learned", "-"), ("none", "--")):
                series = results.series(arm(results.setting, kind, width), seed, "logits_rms")
                steps.plot(list(series), list(series.values()), style, color=f"C{number}", label=f"{kind}, {width}")
        for panel, label in ((norms, "RMS of W"), (rms, "RMS"), (scales, "learned scale (dashed: muP's power)")):
            panel.set(xscale="log", yscale="log", xlabel="hidden size", ylabel=label)
        steps.set(yscale="log", xlabel="step", ylabel="RMS of logits")
        for panel in (norms, rms, scales, steps):
            panel.legend(fontsize=6)


EXPERIMENT = Experiment(
    "E8",
    "Width",
    CLAIMS,
    lambda setting: [arm(setting, kind, width) for width in WIDTHS for kind in ARMS],
    plot,
    seeds=1,
    package=False,
)
