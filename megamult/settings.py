"""A run's configuration as flat keys, and how two configurations differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A key whose value differs; each side's value, or ABSENT."""

    key: str
    mine: Any
    its: Any


ABSENT = object()
"""Stands for the value of a key that a configuration does not have."""


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested mappings by dotted key: {"optimizer": {"lr": 1}} is {"optimizer.lr": 1}; values as JSON has them
    (a tuple is a list). An empty mapping has no leaves."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            found[str(key)] = json.loads(json.dumps(value))
    return found


def run_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A run's whole configuration, flat; a `deepspeed` section that is not given is an empty one, and so are those of
    the update rules that the optimizer does not use."""
    optimizer = {key: value for key, value in configuration.get("optimizer", {}).items() if value is not None}
    return flat({**configuration, "optimizer": optimizer, "deepspeed": configuration.get("deepspeed") or {}})


def differences(mine: Mapping[str, Any], its: Mapping[str, Any]) -> list[Difference]:
    """Keys of two flat configurations whose values differ: in the order of `mine`, then those that only `its` has."""
    keys = [*mine, *(key for key in its if key not in mine)]
    pairs = [Difference(key, mine.get(key, ABSENT), its.get(key, ABSENT)) for key in keys]
    # In Python True is 1; 1 and 1.0 are the same setting.
    return [
        pair for pair in pairs if pair.mine != pair.its or isinstance(pair.mine, bool) is not isinstance(pair.its, bool)
    ]


def shown(value: Any) -> str:
    """A value as YAML's flow style has it; "not set" for ABSENT."""
    return "not set" if value is ABSENT else json.dumps(value, ensure_ascii=False)
