"""The experiments of examples/paper on checkpoints whose norms are known, and their simulations against optimizers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.paper import e02_brownian_motion as e02
from examples.paper import e05_row_norms as e05
from examples.paper.arms import ALL, NONE
from examples.paper.brownian import adamw_motion, learning_rates, muon_motion
from examples.paper.experiment import NotRun, Results
from examples.paper.grid import Grid, nested
from examples.paper.matrices import matrices, pooled_norms, root_mean_squares
from megamult.models.common.hugging_face import Weight
from megamult.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from tests.paper.settings import tiny, write_run

SEEDS = (1, 2, 3)


def test_adamws_motion_is_torchs_adamw_on_the_same_noise() -> None:
    rates, weight_decay, count = [0.01 * (step + 1) for step in range(8)], 0.3, 200
    motion = adamw_motion(rates, weight_decay, AdamWConfig(), elements=count, seed=4)
    draw = np.random.default_rng(4)
    weight = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))
    decayed = 1.0
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.from_numpy(draw.standard_normal(count))
        optimizer.step()
        decayed *= 1 - lr * weight_decay
        assert motion.noise[step] == pytest.approx(weight.detach().square().mean().sqrt().item(), rel=1e-9)
        assert motion.kept[step] == pytest.approx(decayed)
    assert motion.rms(0.5, 8) == pytest.approx(math.hypot(0.5 * decayed, motion.noise[-1]))


def test_adamws_equilibrium_is_that_of_noise_and_decay() -> None:
    lr, weight_decay = 4e-3, 1.0
    steps = round(8 / (2 * lr * weight_decay))  # eight time constants
    noise = adamw_motion([lr] * steps, weight_decay, AdamWConfig()).noise[-1]
    # 0.965 with betas 0.9 and 0.95, for small lr x weight_decay; 10^4 elements leave 0.7 %.
    assert noise == pytest.approx(0.965 * math.sqrt(lr / (2 * weight_decay)), rel=0.02)


@pytest.mark.parametrize("shape", [(24, 16), (12, 32)])
def test_muons_motion_is_torchs_muon_on_the_same_noise(shape: tuple[int, int]) -> None:
    rates, weight_decay = [0.02] * 12, 0.5
    motion = muon_motion(rates, weight_decay, MuonConfig(), shape, seed=3)
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon(
        [weight], lr=rates[0], weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(len(rates)):
        weight.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        # torch's Newton-Schulz computes in bf16, which keeps 8 bits of each product.
        assert motion.noise[step] == pytest.approx(weight.detach().square().mean().sqrt().item(), rel=0.02)


def test_the_schedule_of_a_motion_is_the_runs() -> None:
    setting = tiny()
    config = OptimizerConfig.of(nested(setting.configuration({}))["optimizer"])
    rates = learning_rates(config, setting.steps)
    assert rates[0] == rates[3] == 4e-3 and rates[-1] == pytest.approx(4e-3 / 8) and len(rates) == 6


def spread(weight: Weight, seed: int, deviation: float) -> Tensor:
    """Row multipliers exp(deviation x N(0, 1))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(deviation * torch.randn(weight.shape[0], generator=generator))


def noise(weight: Weight, seed: int, scale: float = 1.0) -> Tensor:
    """W of N(0, scale^2)."""
    return scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def test_matrices_are_read_with_their_multipliers_by_role(tmp_path: Path) -> None:
    grid, arm = Grid(tmp_path), ALL["adamw"]

    def value(weight: Weight, step: int) -> dict[str, Tensor]:
        if weight.role in ("norm", "head"):
            return {"": torch.full(weight.shape, 3.0)}
        return {
            "": torch.full(weight.shape, 2.0),
            "row": torch.arange(1.0, weight.shape[0] + 1),
            "col": torch.full(weight.shape[1:], 0.5),
        }

    write_run(grid, arm, 1, [2], value)
    checkpoint = Results(tiny(), grid, (1,)).checkpoint(arm, 1, 2)
    found = list(matrices(checkpoint))
    assert [matrix.role for matrix in found[:3]] == ["embedding", "q", "k"] and found[-1].role == "head"
    assert len(found) == 1 + 7 * 2 + 1
    q = found[1]
    assert torch.equal(q.effective, torch.arange(1.0, 65)[:, None].expand(64, 64))
    norms = root_mean_squares(checkpoint)
    assert norms["q"] == 2.0 and norms["q/col"] == 0.5 and norms["head"] == 3.0 and "head/row" not in norms
    assert norms["q/row"] == pytest.approx(math.sqrt(sum(n * n for n in range(1, 65)) / 64))
    pooled = pooled_norms(checkpoint)
    assert pooled["rows of W"]["q"] == pytest.approx(np.ones(2 * 64))
    assert pooled["rows of W_eff"]["q"] == pytest.approx(np.tile(np.arange(1, 65) / 32.5, 2))
    assert pooled["columns of W_eff"]["q"] == pytest.approx(np.ones(2 * 64))


@pytest.mark.parametrize(("deviation", "verdict"), [(0.4, "reproduced"), (0.07, "not reproduced")])
def test_e5_sees_multipliers_that_spread_rows(tmp_path: Path, deviation: float, verdict: str) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    for seed in SEEDS:
        write_run(read.grid, NONE["adamw"], seed, [4], lambda weight, step, s=seed: {"": noise(weight, s)})
        write_run(
            read.grid,
            ALL["adamw"],
            seed,
            [4],
            lambda weight, step, s=seed: {
                "": noise(weight, s),
                **({"row": spread(weight, s, deviation)} if len(weight.shape) == 2 else {}),
            },
        )
    rows, latent, control = e05.CLAIMS
    assert rows.measure(read).verdict == verdict
    assert latent.measure(read).verdict == "reproduced"
    with pytest.raises(NotRun):
        control.measure(read)


def test_e5_sees_a_latent_matrix_that_spreads(tmp_path: Path) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    for seed in SEEDS:
        write_run(read.grid, NONE["adamw"], seed, [4], lambda weight, step, s=seed: {"": noise(weight, s)})
        write_run(
            read.grid,
            ALL["adamw"],
            seed,
            [4],
            lambda weight, step, s=seed: (
                {"": noise(weight, s) * spread(weight, s, 0.4).unsqueeze(-1)}
                if len(weight.shape) == 2
                else {"": noise(weight, s)}
            ),
        )
    assert e05.CLAIMS[1].measure(read).verdict == "not reproduced"


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "reproduced"), (1.6, "not reproduced")])
def test_e2_compares_norms_with_the_motion(tmp_path: Path, factor: float, verdict: str) -> None:
    read = Results(tiny(), Grid(tmp_path), SEEDS)
    assert e02.compared_steps(read) == [4, 6]
    predicted = e02.motions(read, "adamw", ("q", "embedding", "multipliers"))
    initial = {"embedding": 0.02, "attention_out": 0.02 / 2, "down": 0.02 / 2}  # sqrt(2 x 2 layers)

    def value(weight: Weight, step: int, with_multipliers: bool) -> dict[str, Tensor]:
        rms = factor * predicted["q"].rms(initial.get(weight.role, 0.02), step)
        # A tensor of one value has exactly this RMS.
        found = {"": torch.full(weight.shape, rms)}
        if with_multipliers and weight.role not in ("norm", "head"):
            found |= {"row": torch.full(weight.shape[:1], 1.5), "col": torch.full(weight.shape[1:], 0.9)}
        return found

    for seed in SEEDS:
        for arm, has in ((NONE["adamw"], False), (ALL["adamw"], True)):
            write_run(read.grid, arm, seed, [2, 4, 6], lambda weight, step, has=has: value(weight, step, has))
    blocks, embedding, muon, multipliers = (claim for claim in e02.CLAIMS)
    for claim in (blocks, embedding):
        measured = claim.measure(read)
        assert measured.verdict == verdict
        assert measured.estimate is not None and measured.estimate.mean == pytest.approx(math.log(factor), rel=1e-5)
    # Half of the multipliers are 50 % above 1, half 10 % below: the median is between.
    measured = multipliers.measure(read)
    assert measured.verdict == "reproduced"
    assert measured.estimate is not None and measured.estimate.mean == pytest.approx(0.3)
    with pytest.raises(NotRun):
        muon.measure(read)
