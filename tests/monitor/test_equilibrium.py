"""The predicted RMS against optimizers that are fed with noise, and the warnings that follow from its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megamult.monitor.decay import decay_warnings
from megamult.monitor.equilibrium import MUON_GAIN, Trajectory, adamw_gain, equilibrium_rms, gain
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from megamult.optim.muon.coefficients import coefficients
from megamult.optim.muon.newton_schulz import orthogonalize
from megamult.optim.schedule import lr_factor


def of_adamw(config: OptimizerConfig, std: float, steps: int) -> list[float]:
    """RMS after each step of AdamW with N(0, 1) gradients."""
    assert config.adamw is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(std * torch.randn(10_000, generator=generator))
    optimizer = torch.optim.AdamW([weight], betas=config.adamw.betas, weight_decay=config.weight_decay)
    found = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(step, steps, config)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        found.append(weight.detach().square().mean().sqrt().item())
    return found


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_the_trajectory_is_that_of_adamw_fed_with_noise(std: float) -> None:
    """Warm-up, constant stage and decay of a run that is three time constants long, from below and from above."""
    steps = 600
    config = OptimizerConfig(
        lr=4e-3, weight_decay=0.8, warmup_steps=30, decay_steps=120, decay="exponential", min_lr=5e-4
    )
    line = Trajectory(
        std,
        (config.lr * lr_factor(step, steps, config) for step in range(steps)),
        config.weight_decay,
        adamw_gain((0.9, 0.95)),
    )
    simulated = of_adamw(config, std, steps)
    for step in range(60, steps + 1, 60):
        # 10,000 elements: 0.7 %. The gain is known to about 1 %.
        assert line.after(step) == pytest.approx(simulated[step - 1], rel=0.03), step
    if std == 0.02:  # of initial weights exp(-lr wd 480) is left: nothing of these, and 0.04 of the larger ones
        assert simulated[479] == pytest.approx(equilibrium_rms(4e-3, 0.8, adamw_gain((0.9, 0.95))), rel=0.05)


def test_muons_equilibrium_is_within_the_simulated_range() -> None:
    lr, decay, shape, momentum = 4e-3, 0.8, (8, 32, 48), 0.95
    generator = torch.Generator().manual_seed(0)
    weight, buffer = torch.zeros(shape), torch.zeros(shape)
    steps = coefficients("simple", 5)
    found = []
    for step in range(900):
        gradient = torch.randn(shape, generator=generator)
        buffer.lerp_(gradient, 1 - momentum)
        update = orthogonalize(gradient.lerp(buffer, momentum), steps, torch.float32) * 0.2 * math.sqrt(48)
        weight.mul_(1 - lr * decay).sub_(lr * update)
        if step >= 600:
            found.append(weight.square().mean().item())
    measured = math.sqrt(sum(found) / len(found)) / math.sqrt(lr / (2 * decay))
    assert measured == pytest.approx(MUON_GAIN, rel=0.1)


def test_the_gain_follows_the_optimizer_that_updates_the_matrix() -> None:
    muon = OptimizerConfig(name="muon", muon=MuonConfig(scale="spectral"))
    assert gain(OptimizerConfig(), "matrix", 3, 4) == gain(muon, "embedding", 3, 4) == pytest.approx(0.965)
    assert gain(muon, "matrix", 3, 4) == pytest.approx(5 * MUON_GAIN)  # spectral is match_rms_adamw without 0.2
    assert gain(OptimizerConfig(name="muon", muon=MuonConfig(momentum=0.9)), "matrix", 3, 4) is None
    assert gain(OptimizerConfig(name="normuon"), "matrix", 3, 4) is None
    assert adamw_gain((0.9, 0.999)) == pytest.approx(0.98)
    assert 0.965 < adamw_gain((0.9, 0.99)) < 0.98
    assert gain(OptimizerConfig(adamw=AdamWConfig(betas=(0.9, 0.9))), "head", 3, 4) == pytest.approx(0.965)


def test_there_is_no_equilibrium_without_decay() -> None:
    assert equilibrium_rms(1e-3, 0.0, 1.0) == math.inf


Case = tuple[OptimizerConfig, MultipliersConfig, int]


def cases() -> list[tuple[Callable[[], Case], list[str]]]:
    strong = OptimizerConfig(lr=4e-3, weight_decay=0.8)  # 600 steps are 3.8 time constants
    return [
        (lambda: (strong, MultipliersConfig(weight_decay=0.1), 600), []),
        (lambda: (strong, MultipliersConfig(), 600), ["multipliers.weight_decay"]),
        (lambda: (strong, MultipliersConfig(lr=4e-1), 600), []),
        (lambda: (strong, MultipliersConfig(weight_decay=0.0), 600), []),
        (lambda: (strong, MultipliersConfig(placement="symmetry_free"), 600), []),
        (lambda: (strong, MultipliersConfig(implementation="none"), 600), []),
        (lambda: (OptimizerConfig(), MultipliersConfig(implementation="none"), 1600), ["optimizer.weight_decay"]),
        (lambda: (OptimizerConfig(), MultipliersConfig(implementation="none"), 1700), []),  # of 5,000
        (
            lambda: (OptimizerConfig(decay_steps=1700), MultipliersConfig(implementation="none"), 1700),
            ["optimizer.weight_decay"],
        ),
        (lambda: (OptimizerConfig(weight_decay=0.0), MultipliersConfig(implementation="none"), 10), []),
    ]


@pytest.mark.parametrize(("case", "expected"), cases())
def test_a_decay_that_does_nothing_is_warned_about(case: Callable[[], Case], expected: list[str]) -> None:
    optimizer, multipliers, steps = case()
    found = decay_warnings(optimizer, multipliers, [lr_factor(step, steps, optimizer) for step in range(steps)])
    assert [warning.split()[0] for warning in found] == expected


def test_the_warnings_say_how_little_the_decay_does_and_what_to_set() -> None:
    (multipliers, weights) = decay_warnings(OptimizerConfig(), MultipliersConfig(), [1.0] * 100)
    assert "by 0.02 % of itself" in multipliers and "rows of up and columns of down" in multipliers
    assert "set multipliers.placement to symmetry_free" in multipliers
    assert "0.068 with a time constant of 5,000 steps" in weights and "after 0.02 time constants" in weights
