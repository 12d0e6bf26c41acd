"""Roles of logical tensors, and the multipliers that each role gets (arXiv 2601.04890, sections on placement).

The table can be extended: an architecture registers the roles of its own layers in its own folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from megamult.parameters import spec
from megamult.parameters.spec import Side

Placement = dict[spec.Role, frozenset[Side]]
"""Sides on which the matrices of each role are scaled. A role that is absent has no multipliers."""

ROW_COL: frozenset[Side] = frozenset({"row", "col"})
NONE: frozenset[Side] = frozenset()


@dataclass(frozen=True)
class Role:
    """Role of logical tensors in a model: the multipliers that they can have, and how they are trained."""

    name: str
    sides: frozenset[Side] = NONE
    """Sides that have multipliers in the placement `all`; empty if tensors of this role can have none."""
    symmetry_free: frozenset[Side] = NONE
    """Sides that have multipliers in the placement `symmetry_free`."""
    optional: frozenset[Side] = NONE
    """Sides that have multipliers only if a placement is given as a mapping that names them."""
    orthogonalized: bool = True
    """Whether Muon and similar optimizers train the matrices of this role."""
    decay: bool = True
    """Whether weight decay applies to tensors of this role."""


ROLES: dict[str, Role] = {}
"""Every known role by name, in the order in which they were registered."""


def register(*roles: Role) -> None:
    """Add roles to the table; adding the same role again changes nothing.

    Raises:
        ValueError: another role has the name of a given one, or the `symmetry_free` of a given role has a side that its
            `sides` lacks.
    """
    for role in roles:
        if ROLES.get(role.name, role) != role:
            raise ValueError(f"the role {role.name!r} is already registered as {ROLES[role.name]}: choose another name")
        if not role.symmetry_free <= role.sides:
            raise ValueError(
                f"the role {role.name!r} has the symmetry-free sides {sorted(role.symmetry_free)} and the sides "
                f"{sorted(role.sides)}: every symmetry-free side must be one of the sides"
            )
        ROLES[role.name] = role


def role(name: str) -> Role:
    """Return the role with this name.

    Raises:
        ValueError: no role has this name.
    """
    if name not in ROLES:
        raise ValueError(
            f"the role {name!r} is not known: use one of {', '.join(ROLES)}, or add it with "
            "megamult.parameters.roles.register"
        )
    return ROLES[name]


_ROW: frozenset[Side] = frozenset({"row"})

register(
    Role("q", ROW_COL, symmetry_free=_ROW),
    Role("k", ROW_COL),
    Role("v", ROW_COL),
    Role("attention_out", ROW_COL, symmetry_free=ROW_COL),
    Role("gate", ROW_COL, symmetry_free=_ROW),
    Role("up", ROW_COL),
    Role("down", ROW_COL, symmetry_free=ROW_COL),
    Role("embedding", ROW_COL, symmetry_free=ROW_COL, orthogonalized=False),
    # The head has multipliers only if a mapping names it. The weights of the final norm already act as its column
    # multipliers, and row multipliers of the head made results worse (arXiv 2601.04890).
    Role("head", optional=ROW_COL, orthogonalized=False),
    Role("norm", orthogonalized=False, decay=False),
    Role("final_norm", orthogonalized=False, decay=False),
    Role("q_norm", orthogonalized=False, decay=False),
    Role("k_norm", orthogonalized=False, decay=False),
    Role("bias", orthogonalized=False, decay=False),
)


TRANSFORMER = tuple(ROLES)
"""Roles of the tensors of a model of transformer layers."""


def placements() -> tuple[str, ...]:
    """Return the names of placements.

    `all`: row and column multipliers on every matrix of every block and on the embedding (the paper's choice).
    `symmetry_free`: `all` without redundant multipliers. A multiplier is redundant if it acts only in a product
    with another factor that the model keeps, as the row multipliers of V do with the column multipliers of the
    attention output. The choice of sides is that of a model without biases and QK-norm, in which some of these
    multipliers are not redundant.
    `scalar`: one scalar for each matrix of `all`.
    """
    return ("all", "symmetry_free", "scalar")


def resolve(placement: str | Mapping[str, str | Sequence[str]], roles: Iterable[str] = TRANSFORMER) -> Placement:
    """Return the placement that a name or a mapping from role to sides describes.

    Args:
        placement: a name that :func:`placements` returns, or a mapping such as
            ``{"q": "row", "down": ["row", "col"]}``.
        roles: roles of the model.

    Raises:
        ValueError: the name or a side is unknown, or a role is none of the model's. The message lists all mistakes.
    """
    roles = tuple(roles)
    if found := mistakes(placement, roles):
        raise ValueError("; ".join(found))
    if isinstance(placement, str):
        scalable = [each for name, each in ROLES.items() if each.sides and name in roles]
        if placement == "scalar":
            return {each.name: frozenset({"scalar"}) for each in scalable}
        chosen = {each.name: each.sides if placement == "all" else each.symmetry_free for each in scalable}
        return {name: sides for name, sides in chosen.items() if sides}
    return {name: frozenset(given) for name, sides in placement.items() if (given := _listed(sides))}


def mistakes(placement: str | Mapping[str, str | Sequence[str]], roles: Iterable[str]) -> list[str]:
    """Return all mistakes in a placement that a user gave, each as fact, value and remedy.

    Args:
        placement, roles: the same as for :func:`resolve`.
    """
    roles = tuple(roles)
    known = [name for name, each in ROLES.items() if (each.sides or each.optional) and name in roles]
    names = ", ".join(known)
    if isinstance(placement, str):
        if placement in placements():
            return []
        return [
            f"multipliers.placement is {placement!r}: use one of {', '.join(placements())}, or a mapping from "
            f"role ({names}) to row, col or scalar"
        ]
    found = [
        f"multipliers.placement names the role {name!r}: use one of {names}" for name in placement if name not in known
    ]
    return found + [
        f"multipliers.placement gives {name} the side {side!r}: use row, col or scalar"
        for name, sides in placement.items()
        for side in _listed(sides)
        if side not in get_args(Side)
    ]


def _listed(sides: str | Sequence[str]) -> list[Any]:
    return [sides] if isinstance(sides, str) else list(sides)
