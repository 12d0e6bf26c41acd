"""Constant factors of a Hugging Face model (Falcon-H1's forward multipliers): merged, or initial values of multipliers.

Either way the imported model computes the same function. They differ in training: a merged factor changes the norm of a
matrix, which weight decay then pulls to its equilibrium; an initial value is a scale that is learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role, Side

ForwardMultipliers = Literal["merge", "initial"]
"""`merge`: weights are multiplied by the factors, and all multipliers start at 1. `initial`: multipliers start at the
factors, and weights are as in the files."""


@dataclass(frozen=True)
class Factors:
    """Where the factors of a model go."""

    weights: Mapping[Role, float]
    """Factors of weights by role; 1 if absent."""
    multipliers: Mapping[tuple[Role, Side], float]
    """Initial values of multipliers by role and side; 1 if absent."""


def assign(
    table: Mapping[tuple[Role, Side], float], how: ForwardMultipliers, placement: Placement, tied: bool
) -> Factors:
    """Return where each factor of a model goes.

    With `initial`, a factor goes to the multipliers on its side, to the scalar of its role if there is one instead, and
    into the weight if the role has neither.

    Args:
        table: factors by role and side (:attr:`megamult.models.common.architecture.Architecture.forward_multipliers`).
        how: whether to merge the factors.
        placement: sides that have multipliers.
        tied: whether the head uses the embedding's weight, without its multipliers. A factor that is merged into this
            weight is taken back in the final norm.

    Raises:
        ValueError: `how` is unknown, or it is `initial` where there are no factors or no multipliers.
    """
    if how not in get_args(ForwardMultipliers):
        raise ValueError(f"forward_multipliers is {how!r}: use one of {', '.join(get_args(ForwardMultipliers))}")
    if how == "initial" and not (table and placement):
        lacks = "the placement none gives it no multipliers" if table else "it has no constant factors"
        raise ValueError(f"forward_multipliers is initial, which does nothing for this model: {lacks}; use merge")
    weights: dict[Role, float] = defaultdict(lambda: 1.0)
    multipliers: dict[tuple[Role, Side], float] = defaultdict(lambda: 1.0)
    for (role, side), factor in table.items():
        places = placement.get(role, frozenset[Side]()) if how == "initial" else frozenset[Side]()
        if side in places:
            multipliers[role, side] *= factor
        elif "scalar" in places:
            multipliers[role, "scalar"] *= factor
        else:
            weights[role] *= factor
    if tied and "embedding" in weights:
        weights["final_norm"] /= weights["embedding"]
    return Factors(dict(weights), dict(multipliers))
