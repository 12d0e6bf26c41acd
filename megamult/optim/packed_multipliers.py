"""Layout of the packed vector of folded multipliers: which of its positions hold which multipliers. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megamult.multipliers.scaling import Places
from megamult.multipliers.specs import LEAVES
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Role, Segment, Side
from megamult.zero.partition import Cut


@dataclass(frozen=True)
class Vector:
    """Multipliers of one side of one logical matrix."""

    name: str
    """Logical name of these multipliers. The layer implementation gives them the same name."""
    module: str
    """Name of the module that has the matrix; empty if the model itself has it."""
    role: Role
    side: Side
    entries: slice
    """Positions of these multipliers in the packed vector; the same positions hold their gradient and AdamW state.
    Vectors that are shared have the same positions."""


def covers(spec: ParameterSpec, placement: Placement) -> bool:
    """Return whether folded multipliers with this placement scale any part of a parameter."""
    return spec.side is None and any(placement.get(part.role) for part in spec.parts)


def lay_out(cuts: Iterable[Cut], placement: Placement, shared_columns: bool) -> tuple[list[Vector], dict[str, Places]]:
    """Assign positions in the packed vector to all multipliers of a model.

    Args:
        cuts: the model's parameters.
        placement: the sides on which each role is scaled.
        shared_columns: whether the logical matrices of a parameter share one vector of column multipliers. Matrices to
            which `placement` gives no column multipliers are left out.

    Returns:
        The vectors, in the order of their positions, and {name of the parameter: {(index of the part, side):
        segments}}. The `start` of a segment is a position in the packed vector.
    """
    vectors: list[Vector] = []
    places: dict[str, dict[tuple[int, Side], list[Segment]]] = {}
    position = 0
    for cut in cuts:
        if not covers(cut.spec, placement):
            continue
        module = cut.name.rpartition(".")[0]
        for side, leaf in LEAVES.items():
            parts = cut.spec.parts_with(placement, side)
            for p in parts:
                part = cut.spec.parts[p]
                length = {"row": part.shape[0], "col": part.shape[1], "scalar": 1}[side]
                name = cut.spec.logical_name(f"{module}.{leaf}" if module else leaf, part)
                vectors.append(Vector(name, module, part.role, side, slice(position, position + length)))
                places.setdefault(cut.name, {})[p, side] = [Segment(position, p, 0, length)]
                if not (side == "col" and shared_columns and p != parts[-1]):
                    position += length
    return vectors, dict(places)
