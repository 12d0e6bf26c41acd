"""Translation of optimizer configurations of earlier versions to today's keys.

Earlier versions had one flat list of keys for all rules. They also named Newton-Schulz coefficients `quintic` and
an update scale `spectral`, although these names mean something else in Megatron and Emerging-Optimizers. Today both
names have Megatron's meaning; what they named in earlier versions is called `simple` and `unit_rms_norm`. If the value
of an old key is `quintic` or `spectral`, it is therefore replaced by `simple` or `unit_rms_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED = {
    "betas": "adamw.betas",
    "eps": "adamw.eps",
    "momentum": "muon.momentum",
    "ns_coefficients": "muon.coefficients",
    "ns_dtype": "muon.ns_dtype",
    "exchange_dtype": "muon.exchange_dtype",
    "update_scale": "muon.scale",
}
"""Mapping from each old key of the section `optimizer` to the key that replaces it."""

RENAMED = {"ns_coefficients": {"quintic": "simple"}, "update_scale": {"spectral": "unit_rms_norm"}}
"""Values that have a new name today, by the old key whose values they are: {old key: {old name: new name}}."""


def is_old(optimizer: Mapping[str, Any]) -> bool:
    """Return whether an optimizer's configuration has keys of an earlier version."""
    return any(key in optimizer for key in MOVED)


def modern(optimizer: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Return an optimizer's configuration with today's keys and names, for the same computation.

    If the optimizer is `adamw`, Muon's old keys are left out, because the earlier version ignored them.

    Args:
        optimizer: the section `optimizer` of any version, as nested mappings.
        name: name of the run's optimizer, if it is stated outside `optimizer`; if None, `name` in `optimizer` is read.

    Raises:
        ValueError: the configuration has both an old key and the key that replaces it.
    """
    found = {key: value for key, value in optimizer.items() if key not in MOVED}
    for old, value in optimizer.items():
        if old not in MOVED:
            continue
        if _ignored(old, optimizer, name):
            continue
        section, _, key = MOVED[old].partition(".")
        keys = dict(found.get(section) or {})
        if key in keys:
            raise ValueError(
                f"optimizer.{old} is {value!r}, and optimizer.{section}.{key} is {keys[key]!r}: these are the old and "
                f"the present name of one key; remove optimizer.{old}"
            )
        found[section] = {**keys, key: _named(old, value)}
    return found


def translations(optimizer: Mapping[str, Any], name: str | None = None) -> list[str]:
    """Return one string for each old key, which says what :func:`modern` makes of it.

    An example is `optimizer.momentum -> optimizer.muon.momentum`.
    """
    said = []
    for old, value in optimizer.items():
        if old not in MOVED:
            continue
        now = _named(old, value)
        if _ignored(old, optimizer, name):
            said.append(f"optimizer.{old} left out (adamw does not use it)")
        else:
            renamed = f" ({value} is called {now} now)" if now != value else ""
            said.append(f"optimizer.{old} -> optimizer.{MOVED[old]}{renamed}")
    return said


def check_modern(keys: Mapping[str, Any]) -> None:
    """Check that no key is one of an earlier version.

    Args:
        keys: keys of the section `optimizer`; their values are not read.

    Raises:
        ValueError: some keys are old; the message names each old key and the key that replaces it.
    """
    old = [key for key in keys if key in MOVED]
    if old:
        said = ", ".join(f"optimizer.{key} is optimizer.{MOVED[key]} now{_hint(key)}" for key in old)
        raise ValueError(f"{said}: use the new key{'s' if len(old) > 1 else ''}")


def _ignored(old: str, optimizer: Mapping[str, Any], name: str | None) -> bool:
    return MOVED[old].startswith("muon.") and (name or optimizer.get("name")) == "adamw"


def _named(old: str, value: Any) -> Any:
    return RENAMED.get(old, {}).get(value, value) if isinstance(value, str) else value


def _hint(old: str) -> str:
    return "".join(f" (where {before} is called {now})" for before, now in RENAMED.get(old, {}).items())
