"""Initial values of multipliers, by role and side. The module does not use torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role, Side


def _one(role: Role, side: Side) -> float:
    return 1.0


@dataclass(frozen=True)
class Initial:
    """Initial values of multipliers, and whether the weights that they scale are divided by them."""

    value: Callable[[Role, Side], float] = _one
    """Function from (role, side) to the initial value of all multipliers on this side of matrices of this role."""
    divide_weights: bool = False
    """Whether initial weights W are divided by the initial multipliers, so that W_eff is the same as if all multipliers
    were 1. If not, W_eff is the initial weight times the initial multipliers."""

    def weight_factor(self, role: Role, placement: Placement) -> float:
        """Return the factor of a role's initial weights.

        It is 1 / (product of the role's initial multipliers) if `divide_weights` is True, else 1.
        """
        if not self.divide_weights:
            return 1.0
        return 1.0 / math.prod(self.value(role, side) for side in placement.get(role, frozenset[Side]()))
