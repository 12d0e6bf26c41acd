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
    """A quantity that a rule keeps from step to step, zero at first.

    A checkpoint holds it under `optimizer.<name>.<name of the logical tensor>`, in the logical tensor's shape or with
    one value for each row, so that a run with any other sharding can load it.
    """

    name: str
    """Name in checkpoints."""
    key: str
    """Key in torch's `state_dict`."""
    per: Literal["element", "row"] = "element"
    """Unit that has one value. element: each element, kept beside the slices of a parameter. row: each row of a logical
    matrix, kept by the rank that owns the matrix."""


class UpdateRule(ABC):
    """Rule by which parameters of one kind are updated. A rule belongs to one optimizer.

    Attributes:
        states: quantities that the rule keeps from step to step.
        defaults: settings that the rule reads from param groups, where a user may change them, with default values.
    """

    states: ClassVar[tuple[State, ...]] = ()
    counts_steps: ClassVar[bool] = False
    """Whether the state of each tensor also holds the number of its updates, under `step`."""
    prepares: ClassVar[bool] = False
    """Whether :meth:`prepare` clips the gradients and replaces them by updates, before the first :meth:`apply`."""

    defaults: Mapping[str, Any] = {}

    def __init_subclass__(cls) -> None:
        """Check that the optimizer can keep every state that a rule names.

        Raises:
            TypeError: a state has one value per row, and the rule's `prepares` is False, so that no rank owns the rows.
        """
        rows = [state.name for state in cls.states if state.per == "row"]
        if rows and not cls.prepares:
            raise TypeError(
                f"{cls.__name__} keeps {', '.join(rows)} of each row and has prepares = False: state of rows belongs "
                "to the owner of a whole matrix, which only prepare() sees; set prepares, or keep it of each element"
            )

    def bind(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> None:  # noqa: B027
        """Remember the partition that :meth:`prepare` will find gradients in.

        Args:
            partition: partition of all of the model's parameters.
            selects: tells whether this rule updates a parameter.
        """

    def slices(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> list[Slice]:
        """Return the slices for whose elements this rank keeps state."""
        return [piece for piece in partition.slices if selects(piece.spec)]

    def rows(self) -> Mapping[str, int]:
        """Return, by name, how many rows each logical matrix has for whose rows this rank keeps state."""
        return {}

    def prepare(self, clip: float, store: StateStore) -> None:  # noqa: B027
        """Do the part of a step that needs the gradients of several groups. Collective over all ranks.

        Args:
            clip: factor that clips the gradients.
            store: the state of this rank.
        """

    @abstractmethod
    def apply(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
    ) -> None:
        """Update the tensors of one param group in place.

        Args:
            group: param group with `lr`, `weight_decay` and this rule's `defaults`.
            parameters: the tensors that have gradients now.
            gradients: the clipped gradient of each; if the rule `prepares`, the update in its place.
            state: the state of each, by the states' keys; empty if the rule `prepares`.
        """
