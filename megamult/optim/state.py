"""Storage for update rules: per-element state in torch's `Optimizer.state`, per-row state in :class:`StateStore`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamult.zero.partition import Slice

if TYPE_CHECKING:
    from megamult.optim.rule import State, UpdateRule

STEP = "step"
"""Key of the number of updates of a tensor, if its rule counts them. When torch loads state, it casts the values under
other keys to the parameter's dtype, but not those under `step`."""


class StateStore:
    """The optimizer state that one rank stores. State that does not exist yet begins at zero.

    Args:
        optimizer: the optimizer whose `state` holds the per-element state, by tensor. torch assigns a new `state` when
            it loads one, so this class reads the attribute in each call.

    Attributes:
        rows: per-row state, {name of the state: {name of the logical matrix: [rows] in fp32}}.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.rows: dict[str, dict[str, Tensor]] = {}

    def of_tensor(self, rule: UpdateRule, tensor: Tensor) -> dict[str, Tensor]:
        """Return the state of one tensor that `rule` updates, by key.

        A state with one value per element has the tensor's shape and dtype. If `rule` counts updates, their number is
        a scalar under the key :data:`STEP`.
        """
        kept: dict[str, Tensor] = self._optimizer.state[tensor]
        if rule.counts_steps and STEP not in kept:
            kept[STEP] = torch.zeros((), device=tensor.device)
        for state in rule.states:
            if state.per == "element" and state.key not in kept:
                kept[state.key] = torch.zeros_like(tensor)
        return kept

    def of_slice(self, rule: UpdateRule, state: State, piece: Slice) -> Tensor:
        """Return one state of a slice that `rule` updates, as a [length] view.

        If every data-parallel rank holds the slice's whole tensor (:attr:`Slice.shared`), the state is in fp32 and
        covers only the slice that this rank works on. Each rank then stores the state of its own slice.

        Raises:
            RuntimeError: the slice is shared, and the loaded state belongs to another interval of the parameter,
                because another rank saved it.
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
        """Make `rows` match the logical matrices whose per-row state this rank now has to store.

        If one of these matrices already has state, this state does not change; if not, its state begins at zero. State
        of all other matrices is dropped.

        Args:
            rules: all rules of the optimizer. Several rules may use one state name for different matrices.
            device: the device of new state.
        """
        before, self.rows = self.rows, {}
        for rule, state in ((each, state) for each in rules for state in each.states if state.per == "row"):
            kept = before.get(state.name, {})
            self.rows.setdefault(state.name, {}).update(
                (name, kept[name] if name in kept else torch.zeros(rows, dtype=torch.float32, device=device))
                for name, rows in rule.rows().items()
            )

    def of_rows(self, state: State, matrices: Sequence[str]) -> Tensor:
        """Return a copy, [matrices, rows], of one state of logical matrices that all have the same number of rows."""
        return torch.stack([self.rows[state.name][name] for name in matrices])

    def keep_rows(self, state: State, matrices: Sequence[str], values: Tensor) -> None:
        """Store new values, [matrices, rows], of one state of these logical matrices."""
        torch._foreach_copy_([self.rows[state.name][name] for name in matrices], list(values.unbind()))

    def all_rows(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name of the state, name of the logical matrix, its [rows] values); the values may be written to."""
        for state, matrices in self.rows.items():
            for name, values in matrices.items():
                yield state, name, values

    def load_rows(self, loaded: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy loaded values into `rows`.

        Args:
            loaded: the `rows` of the store that was saved.

        Raises:
            ValueError: `loaded` has other logical matrices than this store.
        """
        for state, matrices in self.rows.items():
            found = loaded.get(state, {})
            if found.keys() != matrices.keys():
                raise ValueError(
                    f"the state_dict has {state} of {len(found)} matrices, which are not the {len(matrices)} matrices "
                    "that this rank owns: load on each rank the state_dict that it saved"
                )
            for name, values in matrices.items():
                values.copy_(found[name])

    def keep_fp32(
        self, rules: Sequence[UpdateRule], state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
    ) -> None:
        """Restore the fp32 state of rules whose `prepares` is True, after torch has loaded a state dict.

        torch has cast this state to the dtype of the parameter, so it is copied from the state dict again.

        Args:
            rules: all rules of the optimizer.
            state_dict: the state dict that torch has loaded.
            parameters: the parameters of all param groups, in order.
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
        """Return the number of bytes that this rank stores of each state now, by the state's name."""
        found: dict[str, int] = {}
        for rule in rules:
            for state in rule.states:
                if state.per == "row":
                    tensors = list(self.rows.get(state.name, {}).values())
                else:
                    tensors = [kept[state.key] for kept in self._optimizer.state.values() if state.key in kept]
                found[state.name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found
