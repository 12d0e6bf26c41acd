"""E10 of examples/paper on probes whose best factors are known, and the runs that these decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from examples.paper import e10_tuning as e10
from examples.paper import package, report
from examples.paper.arms import ALL, NONE
from examples.paper.experiment import Claim, Results
from examples.paper.grid import Grid, make_run
from tests.paper.settings import losses_of, tiny

BEST = {
    e10.GLOBAL: 2.0,
    ("lr", "embedding"): 2.0,
    ("lr", "head"): 0.25,
    ("lr", "attention"): 1.0,
    ("lr", "MLP"): 0.5,
    ("lr", "norms"): 4.0,
}
BEST_DECAYS = {
    ("weight_decay", "embedding"): 1.0,
    ("weight_decay", "head"): 4.0,
    ("weight_decay", "attention"): 0.5,
    ("weight_decay", "MLP"): 1.0,
}


def results(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> Results:
    """Runs in `folder`."""
    return Results(tiny(), Grid(folder), seeds)


def probes(read: Results, optimizer: str, best: Mapping[e10.Knob, float]) -> None:
    """Write the probes of both seeds: with the first, the loss is lower the nearer a factor is to the best one, and
    with the second the higher."""
    for knob, optimum in best.items():
        for factor in e10.FACTORS:
            distance = abs(math.log(factor / optimum)) - abs(math.log(optimum))
            for seed, sign in ((1, 1.0), (2, -1.0)):
                probe = e10.probe(read.setting, optimizer, knob, factor)
                # The probe without a change is the same for all, with the loss 5.
                if read.grid.state(make_run(read.setting, probe, seed)) != "complete":
                    losses_of(read.grid, read.setting, probe, seed, [6.0] * 3, 5.0 + sign * 0.1 * distance)


def claim(text: str) -> Claim:
    """AdamW's claim that contains this."""
    (found,) = (each for each in e10.EXPERIMENT.claims if each.text.startswith("AdamW") and text in each.text)
    return found


def test_probes_decide_the_factors_by_the_first_seed(tmp_path: Path) -> None:
    read = results(tmp_path)
    assert e10.EXPERIMENT.decided(read) == []
    probes(read, "adamw", BEST)
    arms = {arm.name: dict(arm.overrides) for arm in e10.EXPERIMENT.decided(read)}
    without = {"multipliers.implementation": "none"}
    tuned = {
        "NONE": {"optimizer.name": "adamw", "optimizer.lr": 8e-3},
        "LR": {
            "optimizer.name": "adamw",
            "optimizer.lr": 4e-3,
            "optimizer.lr_factors": {
                "embedding": 2.0,
                "head": 0.25,
                **dict.fromkeys(("gate", "up", "down"), 0.5),
                **dict.fromkeys(("norm", "final_norm"), 4.0),
            },
        },
    }
    # Muon's probes are missing, and those of decays.
    assert arms == {
        f"adamw, {tuning}, {which} multipliers": keys | more
        for tuning, keys in tuned.items()
        for which, more in (("with", {}), ("without", without))
    }
    probes(read, "adamw", BEST_DECAYS)
    more = {arm.name: arm.overrides for arm in e10.EXPERIMENT.decided(read)}
    assert set(more) - set(arms) == {"adamw, LRWD, with multipliers", "adamw, LRWD, without multipliers"}
    keys = more["adamw, LRWD, with multipliers"]
    assert keys["optimizer.lr_factors"] == tuned["LR"]["optimizer.lr_factors"]
    assert keys["optimizer.weight_decay_factors"] == {
        "head": 4.0,
        **dict.fromkeys(("q", "k", "v", "attention_out"), 0.5),
    }
    said = claim("factors that were chosen").measure(read)
    assert said.verdict == "reported" and "NONE: lr of all x 2; LR: lr of embedding x 2, lr of head x 0.25" in said.note


def test_a_tuning_that_changes_nothing_is_the_headlines_runs(tmp_path: Path) -> None:
    read = results(tmp_path)
    probes(read, "muon", dict.fromkeys(BEST, 1.0))
    arms = e10.EXPERIMENT.decided(read)
    names = {make_run(read.setting, arm, 1).name for arm in arms}
    assert len(arms) == 4 and names == {make_run(read.setting, each["muon"], 1).name for each in (NONE, ALL)}


def test_a_probe_that_diverged_is_not_chosen(tmp_path: Path) -> None:
    read = results(tmp_path)
    probes(read, "adamw", BEST)
    probe = e10.probe(read.setting, "adamw", ("lr", "head"), 0.25)
    log = read.grid.directory(make_run(read.setting, probe, 1)) / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": null}\n{"step": 1, "valid_loss": null}\n')
    assert e10.chosen(results(tmp_path), "adamw", "LR")["lr", "head"] == 0.5


def test_a_probe_is_half_a_run_without_multipliers() -> None:
    setting = tiny()
    keys = setting.configuration(e10.probe(setting, "muon", e10.GLOBAL, 4.0).overrides)
    assert keys["train.steps"] == 3 and keys["optimizer.decay_steps"] == 1 and keys["optimizer.lr"] == 0.032
    assert keys["multipliers.implementation"] == "none" and keys["optimizer.weight_decay"] == 0.4
    bare = {make_run(setting, e10.probe(setting, "muon", knob, 1.0), 1).name for knob in BEST}
    assert len(bare) == 1


def test_the_package_trains_probes_with_one_seed_and_what_they_decide_with_all(tmp_path: Path) -> None:
    read, experiments = results(tmp_path, (1, 2)), [e10.EXPERIMENT]
    assert package.chosen_runs(read, experiments) == []
    runs = package.chosen_runs(read, experiments, named=True)
    assert len(runs) == 2 * 25 and {run.seed for run in runs} == {1}
    for optimizer in ("adamw", "muon"):
        probes(read, optimizer, BEST)
    later = package.chosen_runs(read, experiments, named=True)[len(runs) :]
    assert len(later) == 2 * 2 * 2 * 2 and {run.seed for run in later} == {1, 2}


@pytest.mark.parametrize(
    ("tuning", "multipliers", "verdict"),
    [(-0.1, -0.05, "reproduced"), (0.1, 0.05, "not reproduced")],
    ids=["lower", "higher"],
)
def test_claims_compare_the_runs_that_were_decided(
    tmp_path: Path, tuning: float, multipliers: float, verdict: str
) -> None:
    read = results(tmp_path)
    probes(read, "adamw", BEST | BEST_DECAYS)
    for seed in read.seeds:
        # Decays: an effect of 0.04 without multipliers. With them a quarter of it remains, or more than half.
        remains = 0.01 if verdict == "reproduced" else -0.03
        losses = {
            ("NONE", False): 5.0,
            ("NONE", True): 5.0 + multipliers,
            ("LR", False): 5.0 + tuning,
            ("LR", True): 5.0 + tuning + 2 * multipliers,
            ("LRWD", False): 5.0 + tuning - 0.04,
            ("LRWD", True): 5.0 + tuning + 2 * multipliers - remains,
        }
        for key, loss in losses.items():
            arm = e10.arm(read, "adamw", *key)
            # The seeds' differences are a few percent apart, their losses 0.5.
            losses_of(read.grid, read.setting, arm, seed, [6.0] * 6, 4.5 + 0.5 * seed + (loss - 5) * (1 + 0.03 * seed))
    assert claim("NONE: multipliers").measure(read).verdict == verdict
    found = claim("LR: multipliers").measure(read)
    assert found.verdict == verdict
    assert found.estimate is not None and found.estimate.mean == pytest.approx(2 * multipliers * 1.045)
    found = claim("LR - NONE without").measure(read)
    assert found.verdict == verdict and found.estimate is not None
    assert found.estimate.mean == pytest.approx(tuning * 1.045)
    found = claim("LR - NONE with multipliers").measure(read)
    assert found.estimate is not None and found.estimate.mean == pytest.approx((tuning + multipliers) * 1.045)
    found = claim("tuning decays does less").measure(read)
    assert found.verdict == verdict and found.estimate is not None
    assert found.estimate.mean == pytest.approx((0.02 - abs(remains)) * 1.045)


def test_a_plot_is_drawn_of_complete_tunings(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read, file = results(tmp_path, (1,)), tmp_path / "e10.png"
    probes(read, "adamw", BEST)
    assert not report.drawn(e10.plot, read, file)
    for each in (False, True):
        losses_of(read.grid, read.setting, e10.arm(read, "adamw", "LR", each), 1, [6.0] * 6, 5.0)
    assert report.drawn(e10.plot, read, file) and file.read_bytes().startswith(b"\x89PNG")
