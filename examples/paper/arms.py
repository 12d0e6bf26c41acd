"""Arms that several experiments read. Experiments that use the same arm share its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.paper.grid import Arm, nested
from examples.paper.setting import Setting
from megamult.models.architectures import model_section
from megamult.models.common.config import DecoderConfig
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


KINDS: dict[str, dict[str, Any]] = {
    "none": {"multipliers.implementation": "none"},
    "free": {},
    "fixed": {"multipliers.norm": "fixed"},
    "directions": {"multipliers.implementation": "none", "multipliers.norm": "fixed"},
    "mup": {},
}
"""Keys of runs by who sets the scales of their matrices. :func:`mup_keys` adds those of muP."""

HEAD_SIZE = 32
"""Size of the attention heads where models of several widths are compared."""


def at_rate(
    setting: Setting, optimizer: str, kind: str, factor: float, base_hidden_size: int, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Return the keys of runs of one kind at `factor` times the setting's learning rate.

    Weight decay is divided by the factor, so that time constants stay.

    Args:
        setting: the setting.
        optimizer: name of the optimizer.
        kind: one of :data:`KINDS`.
        factor: factor of the learning rate.
        base_hidden_size: width at which muP's factors are 1.
        sizes: keys of the model in which the runs differ from the setting.
    """
    lr, weight_decay = setting.rates[optimizer]
    own = mup_keys(setting, optimizer, base_hidden_size, sizes) if kind == "mup" else sizes | KINDS[kind]
    return {
        "optimizer.name": optimizer,
        "optimizer.lr": lr * factor,
        "optimizer.weight_decay": weight_decay / factor,
        **own,
    }


def sizes_at(width: int) -> dict[str, Any]:
    """Return the keys of a model of a width, a multiple of 64: all other widths are in proportion, with heads of
    HEAD_SIZE of which two share keys and values, and an MLP of 2.75 times the width."""
    heads = width // HEAD_SIZE
    return {
        "model.hidden_size": width,
        "model.num_attention_heads": heads,
        "model.num_query_groups": heads // 2,
        "model.ffn_hidden_size": width * 11 // 4,
    }


def model_of(setting: Setting, sizes: Mapping[str, Any]) -> DecoderConfig:
    """Return the model of runs with these keys, among which may be `model.architecture`."""
    return model_section(nested(setting.configuration(sizes)))


def mup_keys(setting: Setting, optimizer: str, base_hidden_size: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a run without multipliers that has muP's factors relative to a base width.

    At the base width itself all factors are 1, and these are the keys of `none`.

    Args:
        setting: the setting, whose learning rates count as those of the base width.
        optimizer: name of the optimizer.
        base_hidden_size: the base width. Heads have the same size at every width.
        sizes: keys of the model in which the run differs from the setting.

    Raises:
        ValueError: the model is no Llama model, at the base width too.
    """
    model = model_of(setting, sizes)
    base = at_width(model, base_hidden_size)
    if model.hidden_size == base_hidden_size:
        return sizes | KINDS["none"]
    rule = OptimizerConfig(name=optimizer)
    factors = mup(model, base, update_norm(rule))
    found = factors.overrides(model, rule, MultipliersConfig(implementation="none"))
    return sizes | {f"{section}.{key}": value for section, values in found.items() for key, value in values.items()}
