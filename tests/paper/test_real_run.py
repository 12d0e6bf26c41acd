"""A real run of a few steps by the command of the grid, read by the experiments, and its gradients probed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.paper import e09_clipping as e09
from examples.paper import falcon_h1
from examples.paper.arms import ALL, SCALAR
from examples.paper.e14_gradient_snr import KINDS
from examples.paper.experiment import NotRun, Results
from examples.paper.gradient_probe import Moments, by_frequency, quantiles
from examples.paper.grid import Grid, make_run, pretrain
from examples.paper.matrices import matrices, root_mean_squares
from examples.running.attempts import record_attempt
from tests import programs
from tests.paper.settings import tiny
from tests.paper.workers import valid_loss
from tests.processes import run_distributed
from tests.train.command import VOCAB, start

CLIPPED = e09.arm("joint", e09.SMALL)
HYBRID = falcon_h1.WITH["muon"]


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Complete runs of `all`, `scalar`, an arm of E9 and a hybrid, made by the grid's command in forked processes.
    Every step is a monitored step."""
    setting, grid = tiny(str(corpus)), Grid(tmp_path_factory.mktemp("grid"))
    setting = dataclasses.replace(setting, keys={**setting.keys, "monitor.every": 1})
    for arm in (ALL["adamw"], SCALAR, CLIPPED, HYBRID):
        run = make_run(setting, arm, 1)
        grid.claim(run)
        _, script, *arguments = pretrain(run, grid.folder)
        assert script.endswith("launch/pretrain.py")
        outcome = start(arguments)
        assert outcome.code == 0, outcome.text
        record_attempt(grid.directory(run), 1.0, 0)
    return Results(setting, grid, (1,))


def test_its_losses_and_norms_are_read(results: Results) -> None:
    curves = results.curves(ALL["adamw"], 1)
    assert sorted(curves.train) == [1, 2, 3, 4, 5, 6] and sorted(curves.valid) == [6]
    assert results.checkpoint_steps == [2, 4, 6]
    for step in results.checkpoint_steps:
        norms = root_mean_squares(results.checkpoint(ALL["adamw"], 1, step))
        # Initial weights of 0.02, and at most six steps of 4e-3 in one direction.
        assert 0.01 < norms["q"] < 0.05 and norms["q/row"] == pytest.approx(1.0, abs=0.03)


def test_its_figures_are_read_by_step(results: Results) -> None:
    steps = list(range(1, results.setting.steps + 1))
    for metric in ("attention_output_rms", "mlp_output_rms", "residual_rms"):  # E7
        assert list(results.series(ALL["adamw"], 1, f"{metric}/layer_01")) == steps
    for symmetry in ("q_k", "up_down"):  # E6: multipliers that start at 1
        found = results.series(ALL["adamw"], 1, f"imbalance_mean/{symmetry}/layer_01")
        assert list(found) == steps and abs(found[1]) < 0.05
    with pytest.raises(NotRun, match="logits is not recorded"):
        results.series(ALL["adamw"], 1, "logits")


def test_a_hybrid_is_trained_and_its_mixers_are_read(results: Results) -> None:
    rows = falcon_h1.rows.norms(results, HYBRID, 1, "rows of W_eff")
    # Two layers, with 128 channels, state 16 and 4 heads.
    assert [len(rows[role]) for role in (*falcon_h1.ROLES, "ssm_dt")] == [256, 256, 32, 32, 8]
    scales = falcon_h1.log_scales(results, "muon")
    # At most six steps of 8e-3, of rows and of columns.
    assert scales.shape == (1, 2) and 0 < abs(scales).max() < 0.1


def test_clip_factors_from_the_norms_of_every_step_are_those_that_the_monitor_records(results: Results) -> None:
    recorded = results.series(CLIPPED, 1, "clip_factor/main")
    found = e09.clipped(results, "joint", e09.SMALL, 1)
    assert {step: each.factor for step, each in found.items()} == recorded
    assert min(recorded.values()) < 0.9


def test_a_model_filled_for_the_probe_has_the_runs_valid_loss(results: Results) -> None:
    checkpoint = results.checkpoint(ALL["adamw"], 1, results.setting.steps)
    (computed,) = run_distributed(1, valid_loss, checkpoint.path)
    # fp32, in another order of batches: a few units in the last place of a loss near 6.
    assert computed == pytest.approx(results.curves(ALL["adamw"], 1).result, abs=1e-5)


def test_the_probe_has_a_ratio_for_every_matrix_element_and_multiplier(results: Results, tmp_path: Path) -> None:
    for arm, kinds in ((ALL["adamw"], KINDS[:2]), (SCALAR, ("matrix", "scalar")), (HYBRID, KINDS[:2])):
        checkpoint = results.checkpoint(arm, 1, results.setting.constant_end)
        output = tmp_path / f"{arm.name}.json"
        arguments = ["-m", "examples.paper.gradient_probe", str(checkpoint.path), "--output", str(output)]
        done = programs.run([*arguments, "--batches", "3"])
        assert done.returncode == 0, done.stderr
        found = json.loads(output.read_text())
        counts = {"matrix": 0, "vector": 0, "scalar": 0}
        for matrix in matrices(checkpoint):
            if matrix.layer is not None:
                counts["matrix"] += matrix.latent.numel()
                for side, values in matrix.multipliers.items():
                    counts["scalar" if side == "scalar" else "vector"] += values.numel()
        assert {kind: each["count"] for kind, each in found["blocks"].items()} == {kind: counts[kind] for kind in kinds}
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in found["blocks"].values())
        assert found["step"] == results.setting.constant_end
        # Tokens that do not occur have no gradient, so no ratio.
        rows = found["by_role"]["embedding/W"]["count"] / 64
        assert 0 < rows < VOCAB and (arm is SCALAR or 0 < found["by_role"]["embedding/row"]["count"] <= rows)


def test_moments_are_mean_over_sample_deviation() -> None:
    draw = np.random.default_rng(0)
    samples = 5.0 + draw.standard_normal((7, 3))
    samples[:, 2] = 0.1  # no spread, and squares that do not add up exactly
    moments = Moments()
    for sample in samples:
        moments.add({"x": torch.from_numpy(sample)})
    found = moments.signal_to_noise()["x"].numpy()
    expected = np.abs(samples[:, :2].mean(0)) / samples[:, :2].std(0, ddof=1)
    assert found[:2] == pytest.approx(expected)
    assert math.isnan(found[2])


def test_frequent_tokens_are_a_tenth_of_those_that_occur_and_rare_ones_half() -> None:
    occurrences = torch.tensor([0, 100, *range(1, 20), 0])
    ratios = torch.where(occurrences == 100, 9.0, occurrences.double())
    ratios[5] = torch.nan
    found = by_frequency(ratios, occurrences)
    # 20 tokens occur: the two most frequent, with 100 and 19; the ten rarest have 1 to 10, of which one is unknown.
    assert found["frequent"]["count"] == 2 and found["frequent"]["high"] == 9.0
    assert found["rare"]["count"] == 9 and found["rare"]["median"] == 6.0
    assert quantiles(torch.tensor([torch.nan])) == {"count": 0}
