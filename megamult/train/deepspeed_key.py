"""Treatment of one key of the user's DeepSpeed configuration, and the values that a key takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

FLAG, COUNT, POSITIVE = "true or false", "a whole number", "a positive whole number"
NUMBER, PAIR = "a number", "two numbers"
"""Descriptions of the values that a key takes, as messages show them."""


@dataclass(frozen=True)
class Key:
    """Treatment of one key of the user's DeepSpeed configuration."""

    use: Literal["free", "translated", "decided", "refused"]
    """Treatment. free: the key is passed to DeepSpeed. translated: the key is read as a key of megamult's. decided:
    megamult's own keys set it, and only the same value is accepted. refused: the key is an error, because it would have
    no effect in a run, or a wrong one."""
    text: str
    """Explanation. free: what the key does. translated: which of megamult's keys says the same. decided: which of
    megamult's keys sets it. refused: why it is refused, and what to use instead."""
    neutral: Any = False
    """Value that switches a refused key off, and is therefore accepted. null, and a section in which every value is
    false, null or 0, are accepted too."""
    switch: str | None = None
    """Key of a section that switches the section on. If it is null, false, "none" or "auto", the section is off."""
    values: tuple[str, ...] = ()
    """Values that the key accepts, in any case of letters; empty if they are not a short list."""
    takes: str | None = None
    """Description of the values that the key takes: FLAG, COUNT, POSITIVE, NUMBER or PAIR; None if any value is
    handed on."""
    keys: tuple[str, ...] = ()
    """All keys of a section that is handed to DeepSpeed as a whole; empty for other keys."""
    package: str | None = None
    """Package that the section needs when it is enabled; its module has the same name."""

    def off(self, value: Any) -> bool:
        """Return whether `value` switches the key off (see `neutral` and `switch`).

        The key then has no effect, and megamult drops it instead of refusing it.
        """
        if self.switch is not None and isinstance(value, dict) and self.switch in value:
            return value[self.switch] in (None, False, "none", "auto")
        if isinstance(value, dict):
            return all(each is None or each is False or each == 0 for each in value.values())
        return value is None or value == self.neutral

    def wanted(self, value: Any) -> str | None:
        """Return None if the key takes `value`, else a text that says which values it takes."""
        if self.values and str(value).lower() not in map(str.lower, self.values):
            return f"use {' or '.join(self.values)}"
        return f"give {self.takes}" if self.takes is not None and not _fits(value, self.takes) else None


def _fits(value: Any, takes: str) -> bool:
    if takes == FLAG:
        return isinstance(value, bool)
    if takes == PAIR:
        return isinstance(value, list | tuple) and len(value) == 2 and all(_fits(each, NUMBER) for each in value)
    # JSON writes large counts as 5e8 too, which is a float.
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (takes == NUMBER or (value >= (takes == POSITIVE) and float(value).is_integer()))


def free(text: str, **more: Any) -> Key:
    """Return the treatment of a key that is passed to DeepSpeed."""
    return Key("free", text, **more)


def translated(text: str, **more: Any) -> Key:
    """Return the treatment of a key that is read as a key of megamult's."""
    return Key("translated", text, **more)


def decided(text: str) -> Key:
    """Return the treatment of a DeepSpeed key whose value follows from megamult's own keys."""
    return Key("decided", text)


def refused(text: str, **more: Any) -> Key:
    """Return the treatment of a key that is an error."""
    return Key("refused", text, **more)
