"""RMS that weights have if only noise and weight decay act on them: the equilibrium, and the trajectory to it.

If gradients are pure noise, an optimizer's updates make the weights a random walk, and decoupled weight decay pulls the
weights back. The mean square v of the weights then follows, with learning rate lr and weight decay wd in each step::

    v <- (1 - lr wd)^2 v + (lr gain)^2

The gain of an optimizer is the standard deviation of its random walk per step, in units of lr. At a constant rate, v
approaches (gain^2 lr) / (2 wd) with the time constant 1 / (2 lr wd) steps. arXiv 2601.04890 calls the trajectory "Adam
Brownian motion". The trajectory predicts the RMS of matrices whose gradients are mostly noise; gradients with a strong
signal can hold a matrix at another RMS.

Pure functions, without I/O or communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from megamult.optim.config import OptimizerConfig
from megamult.optim.muon.newton_schulz import scale

MUON_GAIN = 0.85
"""Gain of Muon with momentum 0.95 (Nesterov), the coefficients `simple` and an update scaled by 0.2 sqrt(max(out, in)).
Simulated with Gaussian gradients: 0.82 to 0.88."""

_ADAMW_GAINS = ((0.95, 0.965), (0.999, 0.98))
"""(second beta, gain) of AdamW with first beta 0.9, simulated with Gaussian gradients."""


def adamw_gain(betas: tuple[float, float]) -> float:
    """Return the standard deviation per step, in units of lr, of the random walk that AdamW makes of pure noise.

    The result is interpolated in ln(1 - beta2) between two values of beta2 that were simulated. Below the smaller and
    above the larger beta2 it is constant.
    """
    (low, of_low), (high, of_high) = _ADAMW_GAINS
    x = math.log((1 - low) / (1 - min(max(betas[1], low), high))) / math.log((1 - low) / (1 - high))
    return of_low + x * (of_high - of_low)


def gain(config: OptimizerConfig, kind: str, rows: int, cols: int) -> float | None:
    """Return the gain of the optimizer that updates a matrix, or None if it is not known.

    Args:
        config: the section `optimizer`.
        kind: kind of the parameter. If the optimizer is Muon or NorMuon, its rule updates only the kind `matrix`, and
            AdamW updates all other kinds.
        rows, cols: shape of the whole logical matrix.
    """
    if config.name == "adamw" or kind != "matrix":
        assert config.adamw is not None
        return adamw_gain(config.adamw.betas)
    muon = config.muon
    if muon is None or (muon.momentum, muon.nesterov, muon.coefficients) != (0.95, True, "simple"):
        return None
    return MUON_GAIN * scale(rows, cols, muon.scale) / scale(rows, cols, "match_rms_adamw")


def equilibrium_rms(lr: float, weight_decay: float, gain: float) -> float:
    """Return the RMS at which noise and weight decay balance at a constant learning rate; infinite without decay."""
    return gain * math.sqrt(lr / (2 * weight_decay)) if weight_decay else math.inf


class Trajectory:
    """RMS of weights over a run whose gradients are pure noise.

    Args:
        rms: RMS of the initial weights.
        rates: learning rate of every step.
        weight_decay: decoupled weight decay.
        gain: gain of the optimizer.
    """

    def __init__(self, rms: float, rates: Iterator[float], weight_decay: float, gain: float) -> None:
        self._rates, self._weight_decay, self._gain = rates, weight_decay, gain
        self._square, self._steps = rms**2, 0

    def after(self, steps: int) -> float:
        """Return the RMS after `steps` steps. `steps` must not be smaller than in the call before."""
        assert steps >= self._steps
        for lr in itertools.islice(self._rates, steps - self._steps):
            self._square = (1 - lr * self._weight_decay) ** 2 * self._square + (lr * self._gain) ** 2
        self._steps = steps
        return math.sqrt(self._square)
