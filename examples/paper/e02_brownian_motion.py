"""E2: weights are in an equilibrium of noise and weight decay, multipliers are not (Fig. 1, bottom).

Paper: AdamW that gets i.i.d. N(0, 1) gradients under a run's own learning rates and weight decay ("Adam Brownian
motion", ABM) predicts the norms of the matrices, and does not predict those of the multipliers.

Claims, with RMS over all layers of a role, in the headline's runs without and with multipliers, at every checkpoint
later than two warm-ups:

- AdamW, matrices of the blocks: |ln(RMS of W / ABM)| < 0.3. The embedding too. The head is reported apart: its gradient
  has little noise.
- Muon, matrices of the blocks: the same bound, with Gaussian gradients through Muon's own Newton-Schulz.
- Multipliers (AdamW): ABM's final RMS is within 1 % of the initial value 1, while the median over roles and sides of
  |learned RMS - 1| exceeds 20 %.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from examples.paper import plots
from examples.paper.arms import ALL, NAMES, NONE, OPTIMIZERS
from examples.paper.brownian import Motion, adamw_motion, learning_rates, muon_motion
from examples.paper.experiment import Claim, Experiment, Measurement, NotRun, Results
from examples.paper.grid import nested
from examples.paper.matrices import BLOCK_ROLES, root_mean_squares
from examples.paper.paired import estimate, verdict
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.models.architectures import architecture_of, model_section
from megamult.models.common.config import DecoderConfig
from megamult.models.common.parameters import standard_deviations
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig

BOUND = 0.3
"""Largest |ln(measured / ABM)|."""
STILL = 0.01
"""Largest |ABM - 1| of multipliers."""
MOVED = 0.2
"""Smallest median |RMS - 1| of learned multipliers."""
WARMUPS = 2
"""Number of warm-ups after which norms are compared."""


def _configuration(results: Results, optimizer: str) -> tuple[OptimizerConfig, MultipliersConfig, DecoderConfig]:
    sections = nested(results.setting.configuration({"optimizer.name": optimizer}))
    multipliers = MultipliersConfig(**sections.get("multipliers", {}))
    return OptimizerConfig.of(sections["optimizer"]), multipliers, model_section(sections)


def motions(results: Results, optimizer: str, roles: Iterable[str]) -> dict[str, Motion]:
    """Return the motion of each role's matrices in runs of an optimizer, and that of "multipliers".

    Muon's take half a minute. They are kept in a file beside the runs.
    """
    config, multipliers, model = _configuration(results, optimizer)
    steps = results.setting.steps
    rates = learning_rates(config, steps)
    assert config.adamw is not None
    common = adamw_motion(rates, config.weight_decay, config.adamw)
    scaled = [rate * (multipliers.lr or config.lr) / config.lr for rate in rates]
    found = dict.fromkeys(roles, common)
    found["multipliers"] = adamw_motion(scaled, multipliers.weight_decay, config.adamw)
    if config.muon is not None:
        weights = architecture_of(model).weights(model, 1)
        shapes = {weight.role: weight.shape for weight in weights if weight.role in BLOCK_ROLES}
        for role in set(roles) & set(shapes):
            found[role] = _kept_muon_motion(results.grid.folder, rates, config, (shapes[role][0], shapes[role][1]))
    return found


def _kept_muon_motion(folder: Path, rates: list[float], config: OptimizerConfig, shape: tuple[int, int]) -> Motion:
    assert config.muon is not None
    key = json.dumps([rates, config.weight_decay, dataclasses.asdict(config.muon), shape])
    file = folder / f"brownian_motion_{shape[0]}x{shape[1]}_{hashlib.sha256(key.encode()).hexdigest()[:10]}.json"
    if not file.exists():
        motion = muon_motion(rates, config.weight_decay, config.muon, shape)
        file.write_text(json.dumps(dataclasses.asdict(motion)), encoding="utf-8")
    return Motion(**json.loads(file.read_text(encoding="utf-8")))


@lru_cache(maxsize=256)
def _norms(path: Path) -> dict[str, float]:
    return root_mean_squares(SavedCheckpoint(path))


def compared_steps(results: Results) -> list[int]:
    """Return the steps of the checkpoints that are compared."""
    return [step for step in results.checkpoint_steps if step > WARMUPS * results.setting.warmup_steps]


def log_ratios(results: Results, optimizer: str, roles: Sequence[str]) -> list[dict[str, list[float]]]:
    """Return ln(RMS of W / ABM) of the roles, seed by seed: {role: values over both arms and all compared steps}."""
    seeds, steps = results.seeds, compared_steps(results)
    norms = {
        (seed, arms[optimizer].name, step): _norms(results.checkpoint(arms[optimizer], seed, step).path)
        for seed in seeds
        for arms in (NONE, ALL)
        for step in steps
    }
    # Only now: Muon's simulation takes half a minute, and runs may be missing.
    predicted, initial = motions(results, optimizer, roles), standard_deviations(_configuration(results, optimizer)[2])
    found: dict[int, dict[str, list[float]]] = {seed: {role: [] for role in roles} for seed in seeds}
    for (seed, _, step), measured in norms.items():
        for role in roles:
            found[seed][role].append(math.log(measured[role] / predicted[role].rms(initial[role], step)))
    return list(found.values())


def matrices_follow(results: Results, optimizer: str, roles: tuple[str, ...]) -> Measurement:
    """Measure the largest |ln(RMS of W / ABM)| of the roles."""
    ratios = log_ratios(results, optimizer, (*roles, "head"))
    largest = [max(abs(value) for role in roles for value in seed[role]) for seed in ratios]
    ends = [f"{role} {statistics.mean(seed[role][-1] for seed in ratios):+.2f}" for role in (*roles, "head")]
    margin = estimate([BOUND - value for value in largest])
    note = f"largest |ln|; ln at the end, with multipliers: {', '.join(ends)}"
    return Measurement(estimate(largest), verdict(max(largest) < BOUND, margin), note)


def multipliers_do_not(results: Results) -> Measurement:
    """Measure how far the RMS of learned multipliers is from 1, where ABM leaves it."""
    steps = results.setting.steps
    predicted = motions(results, "adamw", ())["multipliers"].rms(1.0, steps)
    medians = []
    for seed in results.seeds:
        norms = _norms(results.checkpoint(ALL["adamw"], seed, steps).path)
        medians.append(statistics.median(abs(value - 1) for key, value in norms.items() if "/" in key))
    moved = estimate(medians)
    holds = abs(predicted - 1) < STILL and min(medians) > MOVED
    return Measurement(moved, verdict(holds, moved), f"median |RMS - 1|; ABM's RMS is {predicted:.4f}")


CLAIMS = (
    Claim(
        "AdamW: noise and decay predict the norms of the blocks' matrices",
        f"|ln(RMS of W / ABM)| < {BOUND:g} in every run, role and checkpoint",
        lambda results: matrices_follow(results, "adamw", BLOCK_ROLES),
    ),
    Claim(
        "AdamW: and that of the embedding",
        f"|ln(RMS of W / ABM)| < {BOUND:g}",
        lambda results: matrices_follow(results, "adamw", ("embedding",)),
    ),
    Claim(
        "Muon: noise and decay predict the norms of the blocks' matrices",
        f"|ln(RMS of W / ABM)| < {BOUND:g} in every run, role and checkpoint",
        lambda results: matrices_follow(results, "muon", BLOCK_ROLES),
    ),
    Claim(
        "AdamW: they do not predict those of the multipliers",
        f"ABM within {100 * STILL:g} % of 1, median |learned RMS - 1| > {100 * MOVED:g} %",
        multipliers_do_not,
    ),
)


def plot(results: Results, file: Path) -> None:
    """Draw norms over the steps: measured as solid lines with dots, ABM dashed."""
    optimizers = [name for name in OPTIMIZERS if _is_complete(results, name)]
    if not optimizers:
        raise NotRun("no set of runs is complete")
    shown, steps = ("q", "attention_out", "gate", "down", "embedding", "head"), results.checkpoint_steps
    with plots.figure(file, 1, len(optimizers) + 1) as panels:
        for optimizer, panel in zip(optimizers, panels, strict=False):
            initial = standard_deviations(_configuration(results, optimizer)[2])
            predicted = motions(results, optimizer, shown)
            for number, role in enumerate(shown):
                norms = [_mean_norm(results, optimizer, role, step) for step in steps]
                panel.plot(steps, norms, "o-", color=f"C{number}", markersize=3, label=role)
                every = range(1, results.setting.steps + 1)
                curve = [predicted[role].rms(initial[role], step) for step in every]
                panel.plot(every, curve, "--", color=f"C{number}", linewidth=0.9)
            panel.set(xlabel="step", ylabel="RMS of W", yscale="log", title=f"{NAMES[optimizer]} (dashed: ABM)")
            panel.legend(fontsize=7)
        optimizer, panel = optimizers[0], panels[-1]
        keys = [
            key for key in _norms(results.checkpoint(ALL[optimizer], results.seeds[0], steps[0]).path) if "/" in key
        ]
        for key in keys:
            panel.plot(steps, [_mean_norm(results, optimizer, key, step) for step in steps], linewidth=0.9, label=key)
        predicted = motions(results, optimizer, ())
        curve = [predicted["multipliers"].rms(1.0, step) for step in steps]
        panel.plot(steps, curve, "k--", label="ABM")
        panel.set(xlabel="step", ylabel="RMS of multipliers", title=NAMES[optimizer])
        panel.legend(fontsize=5, ncols=2)


def _is_complete(results: Results, optimizer: str) -> bool:
    try:
        return all(results.run(ALL[optimizer], seed) for seed in results.seeds)
    except NotRun:
        return False


def _mean_norm(results: Results, optimizer: str, key: str, step: int) -> float:
    """Return a norm in the runs with multipliers, averaged over the seeds."""
    paths = [results.checkpoint(ALL[optimizer], seed, step).path for seed in results.seeds]
    return statistics.mean(_norms(path)[key] for path in paths)


EXPERIMENT = Experiment(
    "E2", "Brownian motion of weights", CLAIMS, lambda setting: [*NONE.values(), *ALL.values()], plot
)
