"""Table of all architectures. A new architecture needs a folder `models/<name>/` and an entry in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.models.common.architecture import Architecture
from megamult.models.common.config import DecoderConfig
from megamult.models.falcon_h1.architecture import FALCON_H1
from megamult.models.llama.architecture import LLAMA

ARCHITECTURES: dict[str, Architecture[Any]] = {each.name: each for each in (LLAMA, FALCON_H1)}
"""Architectures by name."""


def model_class(name: Any) -> type[DecoderConfig]:
    """Return the class of the section `model` of runs with `model.architecture` NAME.

    Raises:
        ValueError: no architecture has this name.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"model.architecture is {name!r}: use one of {', '.join(ARCHITECTURES)}")
    found: type[DecoderConfig] = ARCHITECTURES[name].sizes
    return found


def model_section(configuration: Mapping[str, Any]) -> DecoderConfig:
    """Return the section `model` of a saved configuration.

    Raises:
        KeyError: the configuration has no such section.
        TypeError: the section has keys that this version does not know.
        ValueError: the architecture is unknown, or the sizes in the section do not fit together.
    """
    section = configuration["model"]
    return model_class(section.get("architecture", LLAMA.name))(**section)


def architecture_of(sizes: Any) -> Architecture[Any]:
    """Return the architecture whose configuration class is the type of `sizes`, the section `model` of a run.

    Raises:
        TypeError: no architecture in :data:`ARCHITECTURES` has this class.
    """
    for each in ARCHITECTURES.values():
        if type(sizes) is each.sizes:
            return each
    known = ", ".join(each.sizes.__name__ for each in ARCHITECTURES.values())
    raise TypeError(
        f"a model's sizes are of the type {type(sizes).__name__}, which belongs to no architecture: use one of "
        f"{known}, or add the architecture to megamult/models/architectures.py"
    )


def architecture_of_hugging_face(config: Mapping[str, Any]) -> Architecture[Any]:
    """Return the architecture that a Hugging Face config.json names in `model_type`.

    Raises:
        ValueError: no architecture has this `model_type`.
    """
    kind = config.get("model_type")
    for each in ARCHITECTURES.values():
        if isinstance(kind, str) and kind in each.hugging_face_classes:
            return each
    known = " or ".join(repr(name) for each in ARCHITECTURES.values() for name in each.hugging_face_classes)
    raise ValueError(f"config.json: model_type is {kind!r}, not {known}: import a model of that architecture")
