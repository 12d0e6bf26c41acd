"""Description of one weight for conversion from and to Hugging Face: names, shape, role and multipliers.

The list of a model's weights is in the model's own folder. The names of dtypes in config.json are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from megamult.models.common.norm_weight import NormWeight
from megamult.multipliers.specs import LEAVES
from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role, Side

Item = TypeVar("Item")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights, by their names in config.json."""


@dataclass(frozen=True)
class Weight:
    """One logical tensor: a matrix W[rows, cols], or the vector of a norm."""

    logical: str
    """Name of the logical tensor."""
    hugging_face: str
    """Name of the tensor in a Hugging Face model. Several weights may have the same name: then the tensor holds their
    rows one after the other, in the order of the list of weights."""
    role: Role
    shape: tuple[int, ...]
    """Shape in a Hugging Face model, without the rows of other weights in the same tensor."""
    norm: NormWeight = "vector"
    """Kind of the weight in our model, if it belongs to a norm. In Hugging Face's model it is always a vector."""
    fp32: bool = False
    """Whether our model reads it in fp32 even in a bf16 run, as :attr:`ParameterSpec.fp32` says."""

    @property
    def stored_shape(self) -> tuple[int, ...] | None:
        """Shape in our model. None if the weight is frozen at 1, because our model does not store such a weight."""
        return {"vector": self.shape, "scalar": (1,), "frozen": None}[self.norm]

    def multiplier(self, side: Side) -> tuple[str, tuple[int, ...]]:
        """Return the logical name and shape that multipliers on one side of this weight have, or would have."""
        length = {"row": self.shape[0], "col": self.shape[-1], "scalar": 1}[side]
        return f"{self.logical.rpartition('.')[0]}.{LEAVES[side]}", (length,)

    def multipliers(self, placement: Placement) -> dict[str, tuple[int, ...]]:
        """Return {logical name: shape} of the multipliers that a placement gives to this weight."""
        sides = placement.get(self.role, frozenset[Side]())
        return dict(self.multiplier(side) for side in LEAVES if side in sides)


def by_tensor(weights: Iterable[Item], of: Callable[[Item], Weight]) -> dict[str, list[Item]]:
    """Group weights by the Hugging Face tensor that holds them, in the order of their rows.

    Args:
        weights: the weights, or anything that has one.
        of: function that returns the weight of an item.
    """
    found: dict[str, list[Item]] = {}
    for each in weights:
        found.setdefault(of(each).hugging_face, []).append(each)
    return found


def whole_shape(weights: Sequence[Weight]) -> tuple[int, ...]:
    """Return the shape of the Hugging Face tensor that holds these weights."""
    return (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
