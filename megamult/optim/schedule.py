"""Learning-rate schedules (warm-up, constant, decay), as a function of the step and the configuration only."""

from __future__ import annotations

import math

from megamult.optim.config import OptimizerConfig


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of one step, divided by the peak learning rate.

    The ratio rises linearly over `warmup_steps`, stays at 1, falls over `decay_steps` to min_lr / lr, and stays there
    for `final_steps`, to the end of the run. The fall is a line (`linear`), half a period of a cosine (`cosine`), a
    multiplication by the same factor in each step (`exponential`), or 1 / sqrt(y), where y rises linearly from 1 to
    (lr / min_lr)^2 (`inverse_sqrt`).

    Args:
        step: index of the step, counted from 0.
        steps: number of steps of the run.
        config: `lr`, which is the peak, and the other settings named above.
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
