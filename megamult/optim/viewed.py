"""Named views of a two-phase optimizer's weights and state, through which checkpoints read and write them.

The module also has the optimizer's `state_dict` in torch's format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.multipliers.parametrization import Parametrization
from megamult.optim.fixed_norm import FixedNorms
from megamult.optim.folded import BoundMultipliers, FoldedMultipliers
from megamult.optim.rule import UpdateRule
from megamult.optim.state import STEP, StateStore
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice


class ViewedOptimizer(torch.optim.Optimizer):
    """The part of :class:`megamult.optim.two_phase.TwoPhaseOptimizer` that reads and writes weights and state by name.

    Attributes:
        folding: settings of the folded multipliers; None if there are none.
        folded: the folded multipliers; None before the optimizer is bound to a partition, or if there are none.
        fixed: norms of the matrices of fixed norm; None before the optimizer is bound, or if there are none.
        updates: number of steps that were applied.
        skipped_steps: number of steps that were skipped.
    """

    folding: FoldedMultipliers | None
    folded: BoundMultipliers | None
    fixed: FixedNorms | None
    updates: int
    skipped_steps: int
    _fixed_norm: bool
    _parametrization: Parametrization | None
    _store: StateStore
    _bound: Partition | None

    @abstractmethod
    def bind(self, partition: Partition) -> None:
        """Make the optimizer work on a partition: create all that depends on it, such as folded multipliers."""

    @abstractmethod
    def begin(self) -> None:
        """Prepare for the first step of a training loop without DeepSpeed, in which every rank holds its parameters
        whole."""

    @abstractmethod
    def _every_rule(self) -> list[UpdateRule]:
        """Return all update rules."""

    @abstractmethod
    def _selected_by(self, rule: UpdateRule) -> Callable[[ParameterSpec], bool]:
        """Return a function that takes a parameter's spec and returns whether `rule` updates the parameter."""

    @property
    def state_bytes(self) -> dict[str, int]:
        """Number of bytes that this rank stores of each state now, by the state's name."""
        return self._store.kept(self._every_rule())

    def weight(self, piece: Slice) -> Tensor:
        """Return a [length] view of a slice's fp32 weights: W if its matrix is folded, else the masters."""
        return piece.master if self.folded is None else self.folded.latent(piece.tensor, piece.offset, piece.length)

    def views(self, partition: Partition) -> Iterator[tuple[str, Slice, Tensor]]:
        """Yield views of the weights of this rank's slices, and of each state that has one value per element.

        State can have other slices than weights: at ZeRO 0, that of Muon is divided over the data-parallel ranks. The
        views may be written to.

        Yields:
            (name, slice, values): name is `weight` (see :meth:`weight`) or the name of a state; values is a [length]
            view. State is zero before the first step.
        """
        self.bind(partition)
        for piece in partition.slices:
            yield "weight", piece, self.weight(piece)
        for rule in self._every_rule():
            for piece in rule.slices(partition, self._selected_by(rule)):
                for state in rule.states:
                    if state.per == "element":
                        yield state.name, piece, self._store.of_slice(rule, state, piece)

    def row_views(self, partition: Partition) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the per-row state of each logical matrix that this rank owns. Each matrix has exactly one owner.

        Yields:
            (name of the state, name of the logical matrix, its [rows] values); the values may be written to.
        """
        self.bind(partition)
        yield from self._store.all_rows()

    def restored(self, partition: Partition, updates: int, skipped_steps: int) -> None:
        """Finish a load, after weights and state have been written to :meth:`views` and :meth:`row_views`.

        This sets the numbers of steps, computes W_eff of folded matrices, measures fixed norms that were not loaded,
        and copies the weights to the model. All ranks must call this together.

        Args:
            updates: number of steps that were applied before the save. AdamW's count becomes this number for every
                tensor, also for one whose state was not in the checkpoint and begins at zero. If `updates` is large,
                AdamW hardly corrects the bias of that tensor's moments. The tensor's first update is then about
                (1 - beta1) / sqrt(1 - beta2) times as large as with a count that begins at 0.
            skipped_steps: number of steps that were skipped before the save.

        Raises:
            ValueError: the multipliers have a parametrization, and one of them is not positive; or a matrix whose norm
                is to stay fixed is 0.
        """
        self.updates, self.skipped_steps = updates, skipped_steps
        for state in self.state.values():
            if STEP in state:
                state[STEP].fill_(updates)
        if self.folded is not None:
            self.folded.restored(updates)
        if self.fixed is not None:
            self.fixed.restored()
        self._check_multipliers(partition)
        partition.publish()

    def _check_multipliers(self, partition: Partition) -> None:
        """Check that the multipliers of the layers are positive if the optimizer has a parametrization.

        All ranks must call this together.

        Raises:
            ValueError: a multiplier is not positive, so no value of the trained variable gives it.
        """
        if self._parametrization is None:
            return
        negative = torch.zeros((), dtype=torch.long, device=device.local_device())
        for piece in partition.slices:
            if piece.spec.side is not None:
                for start, length in partition.counted(piece):
                    negative += (~(self.weight(piece)[start : start + length] > 0)).sum()  # of NaN too
        self._parametrization.check(int(partition.mesh.sum_over(negative)))

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with `folded` (multipliers and their state), `fixed_norm` (norms of matrices) and
        `rows` (per-row state) added. A key is absent if the optimizer has nothing for it.

        Before the first step of a loop without DeepSpeed, all ranks must call this together.
        """
        self._begin_if_needed()
        found = super().state_dict()
        if self.folded is not None:
            found["folded"] = self.folded.state_dict()
        if self.fixed is not None:
            found["fixed_norm"] = self.fixed.norms
        if self._store.rows:
            found["rows"] = self._store.rows
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`.

        For folded matrices, the state dict has the latent weights W (without multipliers), from which this method
        computes W_eff. All other weights are only in the model's own state dict, so load both state dicts, in any
        order.

        Raises:
            ValueError: the state dict has folded multipliers and this optimizer has none, or the reverse; the state
                dict has the per-row state of other matrices than this rank owns; or the loaded values are refused as in
                :meth:`restored`.
        """
        folded = state_dict.get("folded")
        if (folded is None) != (self.folding is None):
            has, lacks = ("the state", "this optimizer") if self.folding is None else ("this optimizer", "the state")
            raise ValueError(
                f"{has} has folded multipliers, and {lacks} has none: load the state of an optimizer with "
                "the same placement"
            )
        self._begin_if_needed()
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._store.keep_fp32(self._every_rule(), state_dict, parameters)
        self._store.load_rows(state_dict.get("rows", {}))
        if self.folded is not None and folded is not None:
            self.folded.load_state_dict(folded, self.state)  # torch has replaced `self.state`
        if self.fixed is not None:
            # The state dict of an optimizer without fixed norms has weight decay in its groups, and no norms. The norms
            # are measured instead.
            self._no_decay_of_fixed()
            self.fixed.norms.copy_(state_dict.get("fixed_norm", torch.full_like(self.fixed.norms, torch.nan)))
            self.fixed.restored()
        if self._bound is not None:
            self._check_multipliers(self._bound)

    def _no_decay_of_fixed(self) -> None:
        """Set the weight decay of matrices to 0 if they have fixed norms."""
        for group in self.param_groups if self._fixed_norm else ():
            if group["kind"] == "matrix":
                group["weight_decay"] = 0.0

    def _begin_if_needed(self) -> None:
        """Call :meth:`begin` if it is needed and no partition is bound.

        It is needed if the configuration asks for folded multipliers, fixed norms or per-row state, which only
        :meth:`begin` creates.
        """
        rows = any(state.per == "row" for rule in self._every_rule() for state in rule.states)
        if self._bound is None and (self.folding is not None or self._fixed_norm or rows):
            self.begin()
