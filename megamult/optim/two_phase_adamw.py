"""The optimizer that updates every parameter with AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megamult.optim.adamw import AdamW
from megamult.optim.two_phase import TwoPhaseOptimizer


class TwoPhaseAdamW(TwoPhaseOptimizer):
    """Optimizer that updates every parameter with AdamW. By default, it does not clip the gradients of multipliers.

    Args:
        groups: param groups, made by :func:`megamult.param_groups`.
        betas, eps: arguments of :class:`megamult.optim.adamw.AdamW`.
        driver: keyword arguments of :class:`megamult.optim.two_phase.TwoPhaseOptimizer`.

    Raises:
        ValueError: see :class:`megamult.optim.two_phase.TwoPhaseOptimizer`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **driver: Any,
    ) -> None:
        super().__init__(groups, AdamW(betas, eps), **driver)
