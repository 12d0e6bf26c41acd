"""Warnings at the start of a run about weight decay that the run is too short to see.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamult.monitor.equilibrium import equilibrium_rms, gain
from megamult.monitor.symmetries import redundant_pairs
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig

_INERT = 0.1
"""Largest sum over the run of learning rate x decay that counts as no decay. It shrinks the logarithm of a ratio of two
multipliers by less than 10 %, and the logarithm of a common scale by as much."""

_SHORT = 1 / 3
"""Number of time constants below which a run ends too early to see its equilibrium."""


def decay_warnings(
    optimizer: OptimizerConfig, multipliers: MultipliersConfig, lr_factors: Sequence[float]
) -> list[str]:
    """Return a warning for each weight decay that does nothing, or not what a user expects of it, in a run.

    Args:
        optimizer, multipliers: sections of the run's configuration.
        lr_factors: learning rate of each step of the run divided by the peak.
    """
    steps, at_peak = len(lr_factors), sum(lr_factors)  # `at_peak` steps at the peak do as much
    found = []
    lr, decay = optimizer.lr if multipliers.lr is None else multipliers.lr, multipliers.weight_decay
    of_multipliers = float(steps) if multipliers.schedule == "constant" else at_peak
    pairs = redundant_pairs(multipliers.sides)
    if pairs and 0 < lr * decay * of_multipliers < _INERT:
        found.append(
            f"multipliers.weight_decay {decay:g} does nothing in this run: it moves ln|multiplier| by "
            f"{100 * lr * decay * of_multipliers:.2g} % of itself (learning rate {lr:g} x decay, summed over {steps} "
            f"steps), so it does not hold {', '.join(pairs)}, of which only the product matters; raise it if "
            "imbalance_std in metrics.jsonl grows, or set multipliers.placement to symmetry_free"
        )
    rate = 2 * optimizer.lr * optimizer.weight_decay
    if 0 < rate * at_peak < _SHORT:
        target = equilibrium_rms(optimizer.lr, optimizer.weight_decay, gain(optimizer, "embedding", 1, 1) or 1.0)
        found.append(
            f"optimizer.weight_decay {optimizer.weight_decay:g} at learning rate {optimizer.lr:g} brings the RMS of "
            f"weights to {target:.2g} with a time constant of {1 / rate:,.0f} steps, and the run ends after "
            f"{rate * at_peak:.2g} time constants: the initial weights still decide their scale; train longer, or "
            "raise optimizer.lr or optimizer.weight_decay"
        )
    return found
