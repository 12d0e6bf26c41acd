"""The experiment on a hybrid, on checkpoints and losses that are made by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.paper import falcon_h1, report
from examples.paper.arms import NONE, model_of
from examples.paper.experiment import Measurement, NotRun, Results
from examples.paper.grid import Grid
from examples.paper.setting import gpu, small
from megamult.models.architectures import architecture_of
from megamult.models.common.hugging_face import Weight
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.monitor.names import layer_of
from tests.paper.settings import losses_of, tiny, write_run

SEEDS = (1, 2, 3)


def measure(read: Results, optimizer: str) -> list[Measurement]:
    """Measurements of an optimizer's claims: loss, rows, latent rows, dt."""
    each = len(falcon_h1.EXPERIMENT.claims) // 2
    first = {"adamw": 0, "muon": each}[optimizer]
    return [report.measure(claim, read) for claim in falcon_h1.EXPERIMENT.claims[first : first + each]]


def write(
    read: Results,
    optimizer: str,
    deviation: Callable[[str, int], float],
    latent: float = 0.0,
    scale: Callable[[int, int], float] = lambda layer, seed: 1.0 + layer,
    step: int = 4,
) -> None:
    """Write runs of all seeds without and with multipliers.

    Args:
        read: results that read them.
        optimizer: name of the optimizer.
        deviation: standard deviation of the logarithms of row multipliers by (role, seed).
        latent: standard deviation of the logarithms of row norms of W itself, in the runs with multipliers.
        scale: RMS of the row multipliers of dt by (layer, seed).
        step: step of the checkpoint.
    """

    def value(weight: Weight, seed: int, with_it: bool) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = {"": torch.randn(weight.shape, generator=generator)}
        if with_it and len(weight.shape) == 2:
            rows = torch.randn(weight.shape[0], generator=generator)
            found[""] *= (latent * rows).exp()[:, None]
            found["row"] = (deviation(weight.role, seed) * rows).exp()
            if weight.role == "ssm_dt":
                layer = layer_of(weight.logical)
                assert layer is not None
                found["row"] *= scale(layer, seed) / found["row"].square().mean().sqrt()
            found["col"] = torch.full(weight.shape[1:], 0.5)
        return found

    for seed in read.seeds:
        for arm, with_it in ((falcon_h1.WITHOUT[optimizer], False), (falcon_h1.WITH[optimizer], True)):
            write_run(read.grid, arm, seed, [step], lambda weight, _, s=seed, w=with_it: value(weight, s, w))


def test_the_model_is_the_settings_with_a_mixer() -> None:
    for setting, parameters in ((small(), 3.5e6), (gpu("data/none"), None)):
        hybrid, llama = (model_of(setting, arms["muon"].overrides) for arms in (falcon_h1.WITH, NONE))
        assert isinstance(hybrid, FalconH1Config)
        common = dataclasses.asdict(llama)
        assert {key: getattr(hybrid, key) for key in common} == {**common, "architecture": "falcon_h1"}
        assert hybrid.mixer.rows == (128, 128, 16, 16, 4) and hybrid.layer_kinds == "H" * llama.num_layers
        if parameters:
            count = sum(math.prod(weight.shape) for weight in architecture_of(hybrid).weights(hybrid, 4096))
            assert count == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize(
    ("narrow", "seed", "deviation", "verdict"),
    [
        (None, None, 0.4, "reproduced"),
        ("ssm_c", None, 0.08, "not reproduced"),
        ("ssm_c", 2, 0.0, "not resolved"),
        ("ssm_dt", None, 0.0, "reproduced"),
    ],
    ids=["all roles are wider", "one role is not", "one role is not in one seed", "dt is not claimed"],
)
def test_every_role_but_dt_must_be_wider_in_every_seed(
    tmp_path: Path, narrow: str | None, seed: int | None, deviation: float, verdict: str
) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    # With 64 columns chance gives a CV of 0.09, so that a deviation of 0.08 makes it 1.3 times as wide.
    write(read, "muon", lambda role, s: deviation if role == narrow and s == (seed or s) else 0.4)
    _, rows, latent, _ = measure(read, "muon")
    assert rows.verdict == verdict and latent.verdict == "reproduced", rows
    assert "not claimed: ssm_dt" in rows.note and "ssm_x's rows" in rows.note
    assert [each.verdict for each in measure(read, "adamw")] == ["not run"] * 4


def test_rows_that_the_latent_matrix_spreads_are_seen(tmp_path: Path) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    write(read, "adamw", lambda role, seed: 0.0, latent=0.4)
    _, rows, latent, _ = measure(read, "adamw")
    assert rows.verdict == "reproduced" and latent.verdict == "not reproduced"


@pytest.mark.parametrize(("noise", "verdict"), [(0.05, "reproduced"), (0.4, "not reproduced")])
def test_layers_differ_by_more_than_seeds(tmp_path: Path, noise: float, verdict: str) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    # Two layers whose ln s are 0.6 apart, and a shift of both that differs from seed to seed.
    write(
        read,
        "adamw",
        lambda role, seed: 0.1,
        scale=lambda layer, seed: math.exp(0.6 * layer + noise * (seed - 2)),
        step=6,
    )
    assert falcon_h1.log_scales(read, "adamw")[1] == pytest.approx([math.log(0.5), 0.6 + math.log(0.5)])
    found = measure(read, "adamw")[3]
    assert found.verdict == verdict
    assert found.estimate is not None and found.estimate.mean == pytest.approx(0.6 / math.sqrt(2))
    assert f"sd over seeds {noise:.3f}; s by layer: 0.500, 0.911; Spearman with the layer +1.00" in found.note
    with pytest.raises(NotRun, match="two seeds"):
        falcon_h1.layers_differ(read.first_seeds(1), "adamw")


@pytest.mark.parametrize(("gap", "verdict"), [(-0.02, "reproduced"), (0.02, "not reproduced")])
def test_losses_are_compared_with_the_hybrid_without_multipliers(tmp_path: Path, gap: float, verdict: str) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    for seed in SEEDS:
        losses_of(read.grid, read.setting, NONE["adamw"], seed, [4.0], 4.0)  # a Llama, which must not be read
        losses_of(read.grid, read.setting, falcon_h1.WITHOUT["adamw"], seed, [5.0], 5.0 + 0.3 * seed)
        losses_of(read.grid, read.setting, falcon_h1.WITH["adamw"], seed, [5.0], 5.0 + 0.301 * seed + gap)
    found = measure(read, "adamw")[0]
    assert found.verdict == verdict
    assert found.estimate is not None and found.estimate.mean == pytest.approx(gap + 0.002)


def test_its_figure_is_drawn_of_the_optimizer_that_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read, file = Results(tiny(), Grid(tmp_path), SEEDS), tmp_path / "falcon.png"
    assert not report.drawn(falcon_h1.plot, read, file)
    for step in (4, 6):
        write(read, "muon", lambda role, seed: 0.4, step=step)
    for seed in SEEDS:
        for arms in (falcon_h1.WITHOUT, falcon_h1.WITH):
            directory = losses_of(Grid(tmp_path / "losses"), read.setting, arms["muon"], seed, [5.0, 4.9], 5.0)
            (directory / "metrics.jsonl").rename(tmp_path / directory.name / "metrics.jsonl")
    assert report.drawn(falcon_h1.plot, read, file)
