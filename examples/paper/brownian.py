"""Norms of weights that get only noise: an optimizer's own update rule, schedule and decay with N(0, 1) gradients.

The paper calls it Adam Brownian motion. The gradients do not depend on the weights. The weight at step t is therefore
W_t = a_t W_0 + N_t, where a_t is what decay has left of the initial weight and N_t depends on the gradients only. One
simulation of N serves every initial value: RMS(W_t)^2 = a_t^2 RMS(W_0)^2 + RMS(N_t)^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megamult.distributed import device
from megamult.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from megamult.optim.muon.coefficients import coefficients
from megamult.optim.muon.newton_schulz import orthogonalize, scale
from megamult.optim.schedule import lr_factor

ELEMENTS = 10_000
"""Number of elements that AdamW's simulation has. Their RMS has a relative standard deviation of 0.7 %."""


@dataclass(frozen=True)
class Motion:
    """What noise and decay do to a weight, after each step."""

    kept: list[float]
    """a_t: factor by which decay has multiplied the initial weight."""
    noise: list[float]
    """RMS(N_t)."""

    def rms(self, initial: float, step: int) -> float:
        """Return the RMS of the weight after `step` steps, if it was `initial` at the start."""
        return math.hypot(self.kept[step - 1] * initial, self.noise[step - 1])


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """Return the learning rate of each step of a run."""
    return [config.lr * lr_factor(step, steps, config) for step in range(steps)]


def adamw_motion(
    rates: Sequence[float], weight_decay: float, rule: AdamWConfig, elements: int = ELEMENTS, seed: int = 0
) -> Motion:
    """Simulate AdamW on independent elements.

    Args:
        rates: learning rate of each step.
        weight_decay: decoupled weight decay.
        rule: moments' decay rates, and epsilon.
        elements: number of elements.
        seed: seed of the gradients.
    """
    draw = np.random.default_rng(seed)
    (first, second), epsilon = rule.betas, rule.eps
    mean, square, weight = np.zeros(elements), np.zeros(elements), np.zeros(elements)
    kept, noise, left = [], [], 1.0
    for step, lr in enumerate(rates, 1):
        gradient = draw.standard_normal(elements)
        mean += (1 - first) * (gradient - mean)
        square += (1 - second) * (gradient**2 - square)
        update = mean / (1 - first**step) / (np.sqrt(square / (1 - second**step)) + epsilon)
        weight = (1 - lr * weight_decay) * weight - lr * update
        left *= 1 - lr * weight_decay
        kept.append(left)
        noise.append(float(np.sqrt(np.mean(weight**2))))
    return Motion(kept, noise)


def muon_motion(
    rates: Sequence[float], weight_decay: float, rule: MuonConfig, shape: tuple[int, int], seed: int = 0
) -> Motion:
    """Simulate Muon on one matrix W[out, in], with megamult's own Newton-Schulz in fp32."""
    where = device.local_device()
    generator = torch.Generator(where).manual_seed(seed)
    polynomials = coefficients(rule.coefficients, rule.ns_steps)
    factor = scale(*shape, rule.scale)
    momentum, weight = torch.zeros(shape, device=where), torch.zeros(shape, device=where)
    kept, noise, left = [], [], 1.0
    for lr in rates:
        gradient = torch.randn(shape, generator=generator, device=where)
        momentum.lerp_(gradient, 1 - rule.momentum)
        direction = gradient.lerp_(momentum, rule.momentum) if rule.nesterov else momentum
        update = orthogonalize(direction, polynomials, torch.float32)
        weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * factor)
        left *= 1 - lr * weight_decay
        kept.append(left)
        noise.append(float(weight.square().mean().sqrt()))
    return Motion(kept, noise)
