"""Update rules: the mathematics of an update, and the names of the state that it needs.

The rest of an optimizer, its driver (:mod:`megamult.optim.two_phase`), owns one rule for each kind of parameter. It
creates, saves and restores what a rule names in `states`; the rule only computes with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from megamult.optim.state import StateStore
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice


@dataclass(frozen=True)
class State:
    """A quantity that a rule keeps from step to step, zeros at first.

    A checkpoint holds it under `optimizer.<name>.<name of the logical tensor>`, in the logical tensor's shape, or with
    one value for each of its rows: any sharding reads it.
    """

    name: str
    """Name in checkpoints."""
    key: str
    """Key in torch's `state_dict`."""
    per: Literal["element", "row"] = "element"
    """Unit that has one value: each element, kept beside the slices of a parameter; or each row of a logical
    matrix, kept by the rank that owns the matrix."""


class UpdateRule(ABC):
    """How parameters of one kind are updated. A rule belongs to one optimizer.

    Attributes:
        defaults: settings that the rule reads from param groups, where a user may change them; and their values.
    """

    states: ClassVar[tuple[State, ...]] = ()
    counts_steps: ClassVar[bool] = False
    """Whether the state of each tensor holds the number of its updates too, under `step`."""
    prepares: ClassVar[bool] = False
    """Whether :meth:`prepare` replaces the gradients by updates, clipping included, before the first :meth:`apply`."""

    defaults: Mapping[str, Any] = {}

    def bind(self, partition: Partition, updates: Callable[[ParameterSpec], bool]) -> None:  # noqa: B027
        """Take the partition whose gradients :meth:`prepare` will be given.

        Args:
            partition: all of the model's parameters.
            updates: whether this rule updates a parameter.
        """

    def slices(self, partition: Partition, updates: Callable[[ParameterSpec], bool]) -> list[Slice]:
        """Return the slices beside which this rank keeps state of each element."""
        return [piece for piece in partition.slices if updates(piece.spec)]

    def rows(self) -> Mapping[str, int]:
        """Return the logical matrices of whose rows this rank keeps state, by name, and how many rows each has."""
        return {}

    def prepare(self, clip: float, store: StateStore) -> None:  # noqa: B027
        """Do, once per step, what needs the gradients of several groups. Collective over all ranks.

        Args:
            clip: factor that clips the gradients.
            store: gives the state.
        """

    @abstractmethod
    def apply(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
    ) -> None:
        """Update tensors of one param group in place.

        Args:
            group: with `lr`, `weight_decay` and this rule's `defaults`.
            parameters: that have gradients now.
            gradients: of each, clipped; where the rule `prepares`, what it has put in their place.
            state: of each, by the keys of the states; empty where the rule `prepares`.
        """
