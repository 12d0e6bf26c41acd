"""Types for the Hugging Face form of an architecture: a weight under both its names, and the names of dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamult.multipliers.specs import LEAVES
from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role, Side

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""dtypes of weights, by their names in config.json."""


@dataclass(frozen=True)
class Weight:
    """One logical tensor W[rows, cols], or a norm's vector."""

    logical: str
    hugging_face: str
    role: Role
    shape: tuple[int, ...]

    def multiplier(self, side: Side) -> tuple[str, tuple[int, ...]]:
        """Return the logical name and shape of its multipliers on one side, whether it has any or not."""
        length = {"row": self.shape[0], "col": self.shape[-1], "scalar": 1}[side]
        return f"{self.logical.rpartition('.')[0]}.{LEAVES[side]}", (length,)

    def multipliers(self, placement: Placement) -> dict[str, tuple[int, ...]]:
        """Return name and shape of the multipliers that a placement gives it."""
        sides = placement.get(self.role, frozenset[Side]())
        return dict(self.multiplier(side) for side in LEAVES if side in sides)
