"""Warnings at the start of a run about weight decay that is too weak to take effect within the run.

Pure functions, without I/O or communication.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from megamult.monitor.equilibrium import equilibrium_rms, gain
from megamult.monitor.symmetries import redundant_pairs
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.roles import TRANSFORMER

_INERT = 0.1
"""Sum over the run of learning rate x decay below which decay of multipliers counts as none. Such a decay shrinks the
imbalance ln|a / b| of two multipliers by less than about 10 %, and the logarithm of a common scale by as much."""

_SHORT = 1 / 3
"""Number of time constants below which a run ends too early for its weights to come near their equilibrium."""


def decay_warnings(
    optimizer: OptimizerConfig,
    multipliers: MultipliersConfig,
    lr_factors: Sequence[float],
    roles: Iterable[str] = TRANSFORMER,
    broken: Container[str] = (),
) -> list[str]:
    """Return a warning for each weight decay that is not 0 but too weak to take effect within a run.

    The decay of multipliers is too weak if it hardly moves the imbalance of two multipliers. The decay of weights is
    too weak if the run ends before the RMS of the weights comes near its equilibrium.

    Args:
        optimizer, multipliers: sections of the run's configuration.
        lr_factors: for each step of the run, its learning rate divided by the peak learning rate.
        roles: roles of the model.
        broken: names of symmetries that the model does not have (:func:`megamult.monitor.symmetries.pairs`).
    """
    steps, at_peak = len(lr_factors), sum(lr_factors)  # `at_peak` steps at the peak rate decay as much
    found = []
    lr, decay = optimizer.lr if multipliers.lr is None else multipliers.lr, multipliers.weight_decay
    of_multipliers = float(steps) if multipliers.schedule == "constant" else at_peak
    pairs = redundant_pairs(multipliers.sides(roles), broken)
    if pairs and 0 < lr * decay * of_multipliers < _INERT:
        found.append(
            f"multipliers.weight_decay {decay:g} does nothing in this run: it moves the imbalance ln|a / b| of two "
            f"multipliers by {100 * lr * decay * of_multipliers:.2g} % of itself (learning rate {lr:g} x decay, summed "
            f"over {steps} steps), so multipliers of which only the product matters can drift apart ({', '.join(pairs)}"
            "); raise this decay if imbalance_std in metrics.jsonl grows, or set multipliers.placement to symmetry_free"
        )
    rate = 2 * optimizer.lr * optimizer.weight_decay
    if 0 < rate * at_peak < _SHORT:
        target = equilibrium_rms(optimizer.lr, optimizer.weight_decay, gain(optimizer, "embedding", 1, 1) or 1.0)
        found.append(
            f"optimizer.weight_decay {optimizer.weight_decay:g} at learning rate {optimizer.lr:g} brings the RMS of "
            f"weights to {target:.2g} with a time constant of {1 / rate:,.0f} steps, and the run ends after "
            f"{rate * at_peak:.2g} time constants: the initial weights still decide the scale of the weights at "
            "the end; train longer, or raise optimizer.lr or optimizer.weight_decay"
        )
    return found
