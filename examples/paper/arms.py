"""Arms that several experiments read. Experiments that use the same arm share its runs."""

from __future__ import annotations

from typing import Any

from examples.paper.grid import Arm
from examples.paper.setting import Setting
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.mup import at_width, mup
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.build import update_norm
from megamult.optim.config import OptimizerConfig

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


def mup_keys(setting: Setting, optimizer: str, base_hidden_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a run without multipliers that has muP's factors relative to a base width.

    Args:
        setting: the setting, whose learning rates count as those of the base width.
        optimizer: name of the optimizer.
        base_hidden_size: the base width. Heads have the same size at every width.
        sizes: keys of the model in which the run differs from the setting.
    """
    keys = setting.configuration(sizes)
    model = ModelConfig(**{key.removeprefix("model."): keys[key] for key in keys if key.startswith("model.")})
    rule = OptimizerConfig(name=optimizer)
    factors = mup(model, at_width(model, base_hidden_size), update_norm(rule))
    found = factors.overrides(model, rule, MultipliersConfig(implementation="none"))
    return sizes | {f"{section}.{key}": value for section, values in found.items() for key, value in values.items()}
