"""Settings of a run: marks for those that a resumed run must not change, conversion to flat keys, and comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Why = Literal["function", "samples"]
"""Reason why a resumed run must not change a setting.

`function`: with another value of the setting, the checkpoint's weights would no longer compute the same function.
`samples`: the setting decides which samples come next. It may change only if the run had not trained on any sample
before the checkpoint."""

_FIXED = "fixed when a run resumes"
_Default = TypeVar("_Default")


@dataclass(frozen=True)
class _Fixed:
    why: Why
    attribute: str | None
    note: str


def fixed(default: _Default, why: Why, *, attribute: str | None = None, note: str = "") -> _Default:
    """Return a dataclass field for a setting that a resumed run must not change.

    Args:
        default: default value of the field.
        why: reason why the setting must not change.
        attribute: name of the section's attribute that holds the resolved value, if the field itself does not hold it.
            For example, a field may be null to say that another key's value is used.
        note: what the setting decides, if its name does not say so; messages show it beside the name.
    """
    return dataclasses.field(default=default, metadata={_FIXED: _Fixed(why, attribute, note)})


def fixed_keys(section: type) -> list[str]:
    """Return the keys of a section that a resumed run must not change."""
    return [field.name for field in dataclasses.fields(section) if _FIXED in field.metadata]


def fixed_values(name: str, section: Any, why: Why) -> dict[str, Any]:
    """Return the settings of a section that a resumed run must not change for the reason `why`.

    Args:
        name: name of the section.
        section: instance of the section's class.

    Returns:
        A mapping from the name that messages use for a setting, such as "train.seed (the data's order)", to the
        setting's resolved value.
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
    """Key with different values in two configurations: `mine` in the first, `its` in the second. The value of a missing
    key is ABSENT."""

    key: str
    mine: Any
    its: Any


ABSENT = object()
"""Marker in place of the value of a key that a configuration does not have."""


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to dotted keys: {"optimizer": {"lr": 1}} becomes {"optimizer.lr": 1}.

    Values are converted to JSON and back, so a tuple becomes a list. An empty mapping adds no key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            found[str(key)] = json.loads(json.dumps(value))
    return found


def run_settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the whole configuration of a run.

    If the section `deepspeed` is not given, it adds no key. Keys of `optimizer` that are None, such as the sections
    of update rules that the optimizer does not use, are left out."""
    optimizer = {key: value for key, value in configuration.get("optimizer", {}).items() if value is not None}
    return flat({**configuration, "optimizer": optimizer, "deepspeed": configuration.get("deepspeed") or {}})


def differences(mine: Mapping[str, Any], its: Mapping[str, Any]) -> list[Difference]:
    """List the keys whose values differ between a first flat configuration, `mine`, and a second one, `its`: first the
    keys of `mine`, then the keys that only `its` has."""
    keys = [*mine, *(key for key in its if key not in mine)]
    pairs = [Difference(key, mine.get(key, ABSENT), its.get(key, ABSENT)) for key in keys]
    # In Python True == 1, but they are different settings; 1 and 1.0 are the same setting.
    return [
        pair for pair in pairs if pair.mine != pair.its or isinstance(pair.mine, bool) is not isinstance(pair.its, bool)
    ]


def shown(value: Any) -> str:
    """Return a value as text in YAML's flow style, or "not set" for ABSENT."""
    return "not set" if value is ABSENT else json.dumps(value, ensure_ascii=False)
