"""Learning-rate schedules (warm-up, constant, decay), as a function of the step and the configuration only."""

from __future__ import annotations

import math

from megamult.optim.config import OptimizerConfig


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update `step` (counted from 0) divided by the peak, in a run of `steps` updates.

    The ratio rises linearly over `warmup_steps`, stays at 1, falls over `decay_steps` to min_lr / lr, and stays there
    for `final_steps`, to the end of the run. With `exponential`, each step of the fall multiplies the ratio by the
    same factor. With `inverse_sqrt`, the ratio is 1 / sqrt(y), and y rises linearly from 1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = steps - config.final_steps - config.decay_steps
    if step < start or config.decay_steps == 0:
        return 1.0
    floor = config.min_lr / config.lr
    x = min(1.0, (step - start + 1) / config.decay_steps)
    if config.decay == "linear":
        return 1.0 - (1.0 - floor) * x
    if config.decay == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * x))
    if config.decay == "exponential":
        return floor**x
    return 1.0 / math.sqrt(1.0 + x * (1.0 / floor**2 - 1.0))
