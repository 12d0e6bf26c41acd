"""Initial values of multipliers, by role and side. The module does not use torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import rectangles
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Role, Side


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

    def intervals(
        self, spec: ParameterSpec, coordinates: Coordinates, start: int, length: int
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (start, stop, value) of intervals of multipliers that have the same initial value.

        Args:
            spec: spec of the multipliers.
            coordinates: coordinates of the process.
            start, length: the interval of the process's flattened shard to divide. Positions count from its start.
        """
        assert spec.side is not None
        for r in rectangles(spec, coordinates, start, length):
            yield r.offset, r.offset + r.numel, self.value(spec.parts[r.part].role, spec.side)

    def weight_factor(self, role: Role, placement: Placement) -> float:
        """Return the factor of a role's initial weights.

        It is 1 / (product of the role's initial multipliers) if `divide_weights` is True, else 1.
        """
        if not self.divide_weights:
            return 1.0
        return 1.0 / math.prod(self.value(role, side) for side in placement.get(role, frozenset[Side]()))
