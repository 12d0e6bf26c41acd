"""Settings that are mappings: a user gives numbers for some roles, or for some sides of these roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from megamult.parameters.roles import ROLES, Placement, Role
from megamult.parameters.spec import Side

ByRole = dict[str, float]
"""Numbers by role, as a user gives them: `{head: 0.5}`."""
BySide = dict[str, float | dict[str, float]]
"""Numbers by role, or by role and side, as a user gives them: `{q: 0.5, down: {row: 2.0, col: 1.0}}`."""


def by_role_mistakes(
    key: str,
    given: ByRole,
    roles: Iterable[str],
    allowed: Callable[[Role], bool],
    why: str,
    *,
    positive: bool = False,
) -> list[str]:
    """Return all mistakes in numbers by role, each as fact, value and remedy.

    A role is unknown to the model, a number for it has no effect, or a number is not finite or has the wrong sign.

    Args:
        key: name of the setting, for messages.
        given: the numbers.
        roles: roles of the model.
        allowed: function that returns whether a number for a given role has an effect.
        why: text that a message puts before the list of allowed roles, such as "weight decay applies to".
        positive: whether the numbers must be positive. If not, 0 is allowed too.
    """
    if wrong := _no_mapping(key, given):
        return wrong
    roles = tuple(roles)
    known = [name for name, each in ROLES.items() if name in roles and allowed(each)]
    mistakes = []
    for name, value in given.items():
        if name not in known:
            mistakes.append(f"{key} names the role {name!r}: {why} {', '.join(known)}")
        mistakes += _number(f"{key}.{name}", value, positive)
    return mistakes


def by_side_mistakes(
    key: str, given: BySide, placement: Placement, *, positive: bool = False, apart: bool = False
) -> list[str]:
    """Return all mistakes in numbers by role and side, each as fact, value and remedy.

    The placement gives a role no multipliers, or none on a side that was named; `apart` is True and a role with several
    sides has only one number; a role has an empty mapping of sides; or a number is not finite or has the wrong sign.

    Args:
        key: name of the setting, for messages.
        given: the numbers.
        placement: the sides on which each role of the model has multipliers.
        positive: whether the numbers must be positive. If not, 0 is allowed too.
        apart: whether a role with several sides needs a number for each side.
    """
    if wrong := _no_mapping(key, given):
        return wrong
    mistakes = []
    for role, value in given.items():
        sides = sorted(placement.get(role, frozenset()))
        if not sides:
            mistakes.append(
                f"{key} names the role {role!r}, which has no multipliers in this placement: use one of "
                f"{', '.join(placement)}"
            )
            continue
        if not isinstance(value, Mapping):
            if apart and len(sides) > 1:
                mistakes.append(
                    f"{key}.{role} is {value!r}, and {role} has the sides {', '.join(sides)}: give a number for each "
                    "side"
                )
            mistakes += _number(f"{key}.{role}", value, positive)
            continue
        if not value:
            mistakes.append(f"{key}.{role} is empty: name one of its sides {', '.join(sides)}, or leave {role} out")
        for side, number in value.items():
            if side not in sides:
                mistakes.append(
                    f"{key}.{role} names the side {side!r}: {role} has {', '.join(sides)} in this placement"
                )
            mistakes += _number(f"{key}.{role}.{side}", number, positive)
    return mistakes


def resolve_by_side(given: BySide, placement: Placement) -> dict[tuple[str, Side], float]:
    """Return the numbers that a user gave, by (role, side).

    Args:
        given: the numbers, without :func:`by_side_mistakes`. A number for a role holds for all sides on which the
            placement scales the role.
        placement: the sides on which each role has multipliers.
    """
    found: dict[tuple[str, Side], float] = {}
    for role, value in given.items():
        if isinstance(value, Mapping):
            found.update(((role, side), value[side]) for side in get_args(Side) if side in value)
        else:
            found.update(((role, side), value) for side in sorted(placement.get(role, frozenset())))
    return found


def _no_mapping(key: str, given: object) -> list[str]:
    wrong = f"{key} is {given!r}: give a mapping from roles to numbers, such as {{q: 0.5}}"
    return [] if isinstance(given, Mapping) else [wrong]


def _number(key: str, value: object, positive: bool) -> list[str]:
    wanted = "a positive number" if positive else "a number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return [f"{key} is {value!r}: give {wanted}"]
    return [f"{key} is {value!r}: give {wanted}"] if value < 0 or (positive and value == 0) else []
