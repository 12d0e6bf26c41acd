"""Update rules: the mathematics of an update, and the names of the state that it needs.

:class:`megamult.optim.two_phase.TwoPhaseOptimizer`, the driver, has a rule for each kind of parameter. The driver
creates, saves and restores the state that a rule names in `states`. The rule only reads and changes the values of that
state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from megamult.optim.state import StateStore
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice


@dataclass(frozen=True)
class State:
    """A quantity that an update rule carries from one step to the next, such as momentum. It begins at zero.

    A checkpoint stores it under `optimizer.<name>.<name of the logical tensor>`, in the shape of the logical tensor or
    with one value for each row. A run with another sharding can therefore load it.
    """

    name: str
    """Name in checkpoints."""
    key: str
    """Key in the optimizer's `state` and `state_dict`."""
    per: Literal["element", "row"] = "element"
    """`element`: there is one value for each element, stored by the ranks that hold slices of the parameter. `row`:
    there is one value for each row of a logical matrix, stored by the rank that owns the matrix."""


class UpdateRule(ABC):
    """Rule that updates the parameters of one kind or several. A rule belongs to one optimizer.

    Attributes:
        states: quantities that the rule carries from one step to the next.
        defaults: default values of the settings that the rule reads from param groups. A user may set other values in a
            param group.
    """

    states: ClassVar[tuple[State, ...]] = ()
    counts_steps: ClassVar[bool] = False
    """Whether the state of each tensor also has the number of updates of that tensor, under the key `step`."""
    prepares: ClassVar[bool] = False
    """Whether :meth:`prepare`, which runs before :meth:`apply`, clips the gradients and replaces them by updates."""

    defaults: Mapping[str, Any] = {}
    choices: Mapping[str, Any] = MappingProxyType({})
    """Choices that the rule has made by measuring, as plain values. Checkpoints keep them, and a run that goes on sets
    them before :meth:`bind`, so that it makes the same ones."""

    def __init_subclass__(cls) -> None:
        """Check that a subclass with per-row state (:attr:`State.per`) sets `prepares` to True.

        Raises:
            TypeError: a state has one value per row, but `prepares` is False. Such state is stored by the owner of a
                whole matrix, and only :meth:`prepare` works on whole matrices.
        """
        rows = [state.name for state in cls.states if state.per == "row"]
        if rows and not cls.prepares:
            raise TypeError(
                f"{cls.__name__} has the per-row state {', '.join(rows)}, and prepares = False: the owner of a whole "
                "matrix stores per-row state, and only prepare() works on whole matrices; set prepares = True, or give "
                "the state one value per element"
            )

    def bind(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> None:  # noqa: B027
        """Get ready for :meth:`prepare` on the gradients of a partition. Rules that need it override this method.

        Args:
            partition: the partition of all parameters of the model.
            selects: function that takes a parameter's spec and returns whether this rule updates the parameter.
        """

    def slices(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> list[Slice]:
        """Return the slices whose per-element state this rank stores."""
        return [piece for piece in partition.slices if selects(piece.spec)]

    def rows(self) -> Mapping[str, int]:
        """Return {name: number of rows} of the logical matrices whose per-row state this rank stores."""
        return {}

    def prepare(self, clip: float, store: StateStore) -> None:  # noqa: B027
        """Do the part of a step that needs the gradients of all param groups. All ranks must call this together.

        Args:
            clip: factor by which to multiply the gradients.
            store: the optimizer state that this rank stores.
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
            group: the param group, with `lr`, `weight_decay` and the settings in this rule's `defaults`.
            parameters: those tensors of the group that have a gradient in this call.
            gradients: the clipped gradient of each tensor; if `prepares` is True, the update from :meth:`prepare`.
            state: the state of each tensor, by :attr:`State.key`; empty if `prepares` is True.
        """
