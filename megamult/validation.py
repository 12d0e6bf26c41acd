"""Checks of configuration values. A failure is a ValueError whose message states the fact, the value and a remedy."""

from __future__ import annotations

import math


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def positive(section: str, **values: float) -> None:
    for key, value in values.items():
        require(0 < value < math.inf, f"{section}.{key} is {value}: it must be positive and finite")


def not_negative(section: str, **values: float) -> None:
    for key, value in values.items():
        require(0 <= value < math.inf, f"{section}.{key} is {value}: it must be 0 or more, and finite")
