"""Learning-rate schedules: warm-up, constant, decay. Pure functions of the step."""

from __future__ import annotations

import math

from megamult.optim.config import OptimizerConfig


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update `step` (from 0) over its peak, in a run of `steps` updates.

    It rises linearly over `warmup_steps`, stays constant, and falls over the last `decay_steps` to min_lr / lr at the
    last update. `exponential`: a constant factor per step; `inverse_sqrt`: 1 / sqrt of a straight line.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = steps - config.decay_steps
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
