"""Arms that several experiments read. Experiments that use the same arm share its runs."""

from __future__ import annotations

from examples.paper.grid import Arm

OPTIMIZERS = ("adamw", "muon")
NAMES = {"adamw": "AdamW", "muon": "Muon"}

NONE = {name: Arm(f"{name}, none", {"optimizer.name": name, "multipliers.implementation": "none"}) for name in NAMES}
"""Runs without multipliers, by optimizer."""

ALL = {name: Arm(f"{name}, all", {"optimizer.name": name}) for name in NAMES}
"""Runs with row and column multipliers on every matrix of the blocks and on the embedding, by optimizer."""


def placed(name: str, placement: object) -> Arm:
    """Return an arm with AdamW and another placement of the multipliers."""
    return Arm(f"adamw, {name}", {"optimizer.name": "adamw", "multipliers.placement": placement})


SCALAR = placed("scalar", "scalar")
"""Runs with AdamW and one multiplier per matrix."""
