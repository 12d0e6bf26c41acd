"""Which logical matrices get which multipliers (arXiv 2601.04890, sections on placement)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from megamult.parameters.spec import MULTIPLIER_ROLES, Role, Side

Placement = dict[Role, frozenset[Side]]
"""The sides on which each role's matrices are scaled; a role that is absent has no multipliers."""

_ROW_COL: frozenset[Side] = frozenset({"row", "col"})

NAMED: dict[str, Placement] = {
    "all": dict.fromkeys(MULTIPLIER_ROLES, _ROW_COL),
    "symmetry_free": {
        "q": frozenset({"row"}),
        "attention_out": _ROW_COL,
        "gate": frozenset({"row"}),
        "down": _ROW_COL,
        "embedding": _ROW_COL,
    },
    "scalar": {role: frozenset({"scalar"}) for role in MULTIPLIER_ROLES},
}
"""`all`: row and column multipliers on every matrix of every block and on the embedding (the paper's choice).
`symmetry_free`: without those whose product alone matters. `scalar`: one scalar for each matrix of `all`."""


def resolve(placement: str | Mapping[str, str | Sequence[str]]) -> Placement:
    """The placement that a name or a mapping from role to sides describes.

    Args:
        placement: a key of :data:`NAMED`, or for example ``{"q": "row", "down": ["row", "col"]}``.

    Raises:
        ValueError: an unknown name, role or side.
    """
    if isinstance(placement, str):
        if placement not in NAMED:
            raise ValueError(
                f"multipliers.placement is {placement!r}: use one of {', '.join(NAMED)}, or a mapping from "
                f"role ({', '.join(MULTIPLIER_ROLES)}) to row, col or scalar"
            )
        return dict(NAMED[placement])
    resolved: Placement = {}
    for role, sides in placement.items():
        if role not in MULTIPLIER_ROLES:
            raise ValueError(
                f"multipliers.placement names the role {role!r}: the roles are {', '.join(MULTIPLIER_ROLES)} "
                "(the head carries no multipliers)"
            )
        chosen: list[Any] = [sides] if isinstance(sides, str) else list(sides)
        for side in chosen:
            if side not in get_args(Side):
                raise ValueError(f"multipliers.placement gives {role} the side {side!r}: use row, col or scalar")
        if chosen:
            resolved[role] = frozenset(chosen)
    return resolved
