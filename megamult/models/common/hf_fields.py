"""Reader of config.json that collects all mistakes before it raises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COMMON_DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
"""Values that transformers assumes for absent fields, in most classes."""


class Fields:
    """Fields of a config.json, with transformers' defaults for those that are absent or null.

    A field with an impossible value is noted in `mistakes`, and read as a value that lets the reading go on.

    Args:
        config: the content of config.json.
        defaults: values that transformers assumes for absent fields, beside or in place of :data:`COMMON_DEFAULTS`.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, {**COMMON_DEFAULTS, **defaults}
        self.mistakes: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field; if it is absent or null, transformers' default or else `default`."""
        value = self.config.get(name)
        if value is None:
            value = self.defaults.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int = 1) -> int:
        """Return a positive whole number."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.wrong(name, value, "it must be a positive whole number; correct it")
            return 1
        return value

    def number(self, name: str) -> float:
        """Return a positive number."""
        value = self.get(name)
        if not is_positive(value):
            self.wrong(name, value, "it must be a positive number; correct it")
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.wrong(name, value, "it must be true or false; correct it")
        return value is True

    def wrong(self, name: str, value: Any, remedy: str) -> None:
        """Note a mistake."""
        self.mistakes.append(f"{name} is {value!r}: {remedy}")

    def check(self) -> None:
        """Raise one ValueError that lists all mistakes, if there are any."""
        if self.mistakes:
            raise ValueError(f"config.json: {'; '.join(dict.fromkeys(self.mistakes))}")


def is_positive(value: Any) -> bool:
    """Return whether a value of config.json is a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
