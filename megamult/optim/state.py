"""State of update rules: in torch's `state` of an optimizer, and beside it what belongs to rows of logical matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamult.zero.partition import Slice

if TYPE_CHECKING:
    from megamult.optim.rule import State, UpdateRule

STEP = "step"
"""Key of the number of updates of a tensor, where a rule counts them; torch knows it by this name."""


class StateStore:
    """The optimizer state that one rank keeps. State that was never stored reads as zeros.

    Args:
        optimizer: holds the state of elements in its `state`, by tensor. torch replaces that when a state is loaded.

    Attributes:
        rows: state of matrices' rows, [rows] fp32, by the name of the state, then by that of the logical matrix.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.rows: dict[str, dict[str, Tensor]] = {}

    def of_tensor(self, rule: UpdateRule, tensor: Tensor) -> dict[str, Tensor]:
        """Return the state of a tensor that `rule` updates, by key; each has the tensor's shape and dtype."""
        kept: dict[str, Tensor] = self._optimizer.state[tensor]
        if rule.counts_steps and STEP not in kept:
            kept[STEP] = torch.zeros((), device=tensor.device)
        for state in rule.states:
            if state.per == "element" and state.key not in kept:
                kept[state.key] = torch.zeros_like(tensor)
        return kept

    def of_slice(self, rule: UpdateRule, state: State, piece: Slice) -> Tensor:
        """Return a state of a slice that `rule` updates, a [length] view; fp32 and kept only by this rank
        where the slice is shared.

        Raises:
            RuntimeError: a state was loaded that another rank had kept of the slice.
        """
        if not piece.shared:
            whole = self.of_tensor(rule, piece.tensor)[state.key].view(-1)
            return whole[piece.offset : piece.offset + piece.length]
        kept: dict[str, Any] = self._optimizer.state[piece.tensor]
        interval = f"{state.name}_interval"
        if state.key not in kept:
            kept[state.key] = torch.zeros(piece.length, dtype=torch.float32, device=piece.tensor.device)
            kept[interval] = (piece.start, piece.length)
        elif tuple(kept[interval]) != (piece.start, piece.length):
            start, length = kept[interval]
            raise RuntimeError(
                f"the {state.name} loaded for {piece.name} is that of elements [{start}:{start + length}], and this "
                f"rank's share is [{piece.start}:{piece.start + piece.length}]: load on each rank the state_dict that "
                "it saved"
            )
        return kept[state.key]

    def claim_rows(self, rules: Sequence[UpdateRule], device: torch.device) -> None:
        """Keep the state of rows of the logical matrices that the rules have on this rank now, and of no others: zeros
        of a matrix that is new.

        Args:
            rules: all of the optimizer; several may have a state of the same name, each of other matrices.
            device: to keep it on.
        """
        before, self.rows = self.rows, {}
        for rule, state in ((each, state) for each in rules for state in each.states if state.per == "row"):
            kept = before.get(state.name, {})
            self.rows.setdefault(state.name, {}).update(
                (name, kept[name] if name in kept else torch.zeros(rows, dtype=torch.float32, device=device))
                for name, rows in rule.rows().items()
            )

    def of_rows(self, state: State, matrices: Sequence[str]) -> Tensor:
        """Return a copy [matrices, rows] of a state of logical matrices with the same number of rows."""
        return torch.stack([self.rows[state.name][name] for name in matrices])

    def keep_rows(self, state: State, matrices: Sequence[str], values: Tensor) -> None:
        """Take over what :meth:`of_rows` gave and was changed."""
        torch._foreach_copy_([self.rows[state.name][name] for name in matrices], list(values.unbind()))

    def all_rows(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield every (name of the state, name of the logical matrix, [rows]) of this rank, to read and to write."""
        for state, matrices in self.rows.items():
            for name, values in matrices.items():
                yield state, name, values

    def load_rows(self, loaded: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the `rows` of another store.

        Raises:
            ValueError: they are of other logical matrices.
        """
        for state, matrices in self.rows.items():
            found = loaded.get(state, {})
            if found.keys() != matrices.keys():
                raise ValueError(
                    f"the state has {state} of {len(found)} matrices, and this rank keeps it of {len(matrices)} "
                    "others: load on each rank the state_dict that it saved"
                )
            for name, values in matrices.items():
                values.copy_(found[name])

    def keep_fp32(
        self, rules: Sequence[UpdateRule], state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
    ) -> None:
        """Take over once more, from a state that torch has just loaded, what belongs to rules that prepare: torch has
        cast it to the parameters' dtype, and it stays fp32.

        Args:
            rules: of the optimizer.
            state_dict: that was loaded.
            parameters: of all param groups, in their order.
        """
        keys = [state.key for rule in rules if rule.prepares for state in rule.states]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            found = state_dict["state"].get(index, {})
            for key in keys:
                if key in found:
                    copy = found[key].detach().to(parameter.device, torch.float32, copy=True)
                    self._optimizer.state[parameter][key] = copy

    def kept(self, rules: Sequence[UpdateRule]) -> dict[str, int]:
        """Bytes of each state that this rank keeps now, by the state's name."""
        found: dict[str, int] = {}
        for rule in rules:
            for state in rule.states:
                if state.per == "row":
                    tensors = list(self.rows.get(state.name, {}).values())
                else:
                    tensors = [kept[state.key] for kept in self._optimizer.state.values() if state.key in kept]
                found[state.name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found
