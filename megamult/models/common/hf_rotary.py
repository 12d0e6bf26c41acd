"""Rotary positions in config.json, in the spelling of transformers 4 and in that of transformers 5.

transformers 4 writes `rope_theta` at the top level and the scaling into `rope_scaling`, where `rope_type` was once
called `type`. transformers 5 writes everything into `rope_parameters`. All places are read, and must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.models.common import rotary
from megamult.models.common.hf_fields import Fields, is_positive

_ORIGINAL = "original_max_position_embeddings"


def read(fields: Fields) -> tuple[float, rotary.Scaling | None]:
    """Return the base of the rotary frequencies and their scaling, or None for no scaling.

    What our model does not have, and places that disagree, are noted as mistakes of `fields`.
    """
    config = fields.config
    bases: dict[str, Any] = {}
    scalings: dict[str, rotary.Scaling] = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            fields.mistakes.append(f"{name} is {rope!r}, not a mapping: correct it")
            continue
        if rope.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = rope["rope_theta"]
        scaling = _scaling(fields, name, rope)
        if scaling is not None:
            scalings[name] = scaling
    for name, base in bases.items():
        if not is_positive(base):
            fields.wrong(name, base, "it must be a positive number; correct it")
    if len(set(map(repr, map(_plain, bases.values())))) > 1:
        fields.mistakes.append(
            f"the base of the rotary embedding has different values, "
            f"{' and '.join(f'{name} {base!r}' for name, base in bases.items())}: keep the right one"
        )
    first = next(iter(scalings.values()), {"rope_type": "default"})
    if any(each != first for each in scalings.values()):
        said = " and ".join(f"{name} {config[name]!r}" for name in scalings)
        fields.mistakes.append(f"the scaling of the rotary embedding has different values, {said}: keep the right one")
    base = next(iter(bases.values()), fields.defaults["rope_theta"])
    return float(base) if is_positive(base) else 1.0, None if first["rope_type"] == "default" else first


def _plain(base: Any) -> Any:
    """Return a base in the form in which 500000 and 500000.0 are the same."""
    return float(base) if is_positive(base) else base


def _scaling(fields: Fields, name: str, rope: Mapping[str, Any]) -> rotary.Scaling | None:
    """Return the scaling that one place asks for, or None if it asks for something that our model does not have."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_type", "type", "rope_theta") and value is not None
    }
    if rest.get("partial_rotary_factor") == 1:
        del rest["partial_rotary_factor"]
    if kind == "default":
        if rest:
            fields.mistakes.append(
                f"{name} is {dict(rope)!r}: of the settings of unscaled rotary positions, only rope_theta can be "
                "imported"
            )
        return {"rope_type": "default"} if not rest else None
    scaling = {"rope_type": kind, **rest}
    if kind == "llama3":
        # As in transformers: the field at the top level comes first, and the length of the model's sequences last.
        original = fields.config.get(_ORIGINAL, rest.get(_ORIGINAL))
        if original != rest.get(_ORIGINAL, original):
            fields.mistakes.append(
                f"{_ORIGINAL} is {original!r} and {name}.{_ORIGINAL} is {rest[_ORIGINAL]!r}: keep the right one"
            )
        scaling[_ORIGINAL] = fields.get("max_position_embeddings") if original is None else original
    found = rotary.mistakes(name, scaling)
    fields.mistakes += found
    return None if found else scaling


def written(base: float, scaling: rotary.Scaling | None) -> dict[str, Any]:
    """Return the fields of config.json that describe rotary positions, in both spellings."""
    kind = {"rope_type": "default"} if scaling is None else scaling
    found: dict[str, Any] = {"rope_parameters": {"rope_theta": base, **kind}}
    # Versions of transformers before 5 read only these fields. Without them, they silently use other frequencies.
    found["rope_theta"] = base
    return found if scaling is None else {**found, "rope_scaling": dict(scaling)}
