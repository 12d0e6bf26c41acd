"""Settings of a run: which of them a resumed run must keep, all of them as flat keys, how two sets of them differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Why = Literal["function", "samples"]
"""Why a resumed run must keep a setting. function: with another value the checkpoint's weights are another function.
samples: it decides which samples come next, so it is free until the checkpoint's run has trained on some."""

_FIXED = "fixed when a run resumes"
_Default = TypeVar("_Default")


@dataclass(frozen=True)
class _Fixed:
    why: Why
    attribute: str | None
    note: str


def fixed(default: _Default, why: Why, *, attribute: str | None = None, note: str = "") -> _Default:
    """A dataclass field whose setting a resumed run must keep.

    Args:
        default: of the field.
        why: the reason.
        attribute: the attribute of its section that holds what the setting stands for, if that is not the setting
            itself (null may mean another key's value).
        note: what the setting decides, where its name does not say so; shown beside it.
    """
    return dataclasses.field(default=default, metadata={_FIXED: _Fixed(why, attribute, note)})


def fixed_keys(section: type) -> list[str]:
    """Keys of a section that a resumed run must keep."""
    return [field.name for field in dataclasses.fields(section) if _FIXED in field.metadata]


def fixed_values(name: str, section: Any, why: Why) -> dict[str, Any]:
    """What a resumed run must keep of a section, for the reason `why`.

    Args:
        name: of the section.
        section: an instance.

    Returns:
        The value of each, resolved, by the name that a message gives it: "train.seed (the data's order)".
    """
    found = {}
    for field in dataclasses.fields(section):
        rule = field.metadata.get(_FIXED)
        if rule is not None and rule.why == why:
            label = f"{name}.{field.name} ({rule.note})" if rule.note else f"{name}.{field.name}"
            found[label] = getattr(section, rule.attribute or field.name)
    return found


@dataclass(frozen=True)
class Difference:
    """A key whose value differs, with both values; a value is ABSENT if the configuration has no such key."""

    key: str
    mine: Any
    its: Any


ABSENT = object()
"""The value of a key that a configuration does not have."""


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to dotted keys: {"optimizer": {"lr": 1}} is {"optimizer.lr": 1}. Values become what JSON
    makes of them (a tuple is a list). An empty mapping has no leaves."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            found[str(key)] = json.loads(json.dumps(value))
    return found


def run_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a run's whole configuration. A `deepspeed` section that is not given counts as empty, and so do the
    sections of update rules that the optimizer does not use."""
    optimizer = {key: value for key, value in configuration.get("optimizer", {}).items() if value is not None}
    return flat({**configuration, "optimizer": optimizer, "deepspeed": configuration.get("deepspeed") or {}})


def differences(mine: Mapping[str, Any], its: Mapping[str, Any]) -> list[Difference]:
    """List the keys of two flat configurations whose values differ: in the order of `mine`, then of `its`."""
    keys = [*mine, *(key for key in its if key not in mine)]
    pairs = [Difference(key, mine.get(key, ABSENT), its.get(key, ABSENT)) for key in keys]
    # In Python True == 1, but they are different settings; 1 and 1.0 are the same setting.
    return [
        pair for pair in pairs if pair.mine != pair.its or isinstance(pair.mine, bool) is not isinstance(pair.its, bool)
    ]


def shown(value: Any) -> str:
    """Return a value in YAML's flow style; "not set" for ABSENT."""
    return "not set" if value is ABSENT else json.dumps(value, ensure_ascii=False)
