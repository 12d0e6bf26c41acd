"""The driver of an optimizer in two phases, for DeepSpeed: `prepare` sees all reduced gradients once, `step` applies.

DeepSpeed's ZeRO calls a client optimizer's `step` once per param group (ZeRO 1, 2) or sub-group (ZeRO 3), with that
group's gradient set just before and cleared just after. So whatever needs several groups happens in `prepare`:
completing gradients over tensor-parallel ranks, the norms, the clip factors, the decision to skip a step, and what the
update rules compute on whole matrices.

Outside DeepSpeed the parameters are whole and `step` does both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh, current_mesh
from megamult.optim.clip import Norms, clip_factor
from megamult.optim.folded import BoundMultipliers, FoldedMultipliers
from megamult.optim.param_groups import check_groups
from megamult.optim.reduction import GlobalNorms, sum_partial_gradients
from megamult.optim.rule import UpdateRule
from megamult.optim.state import STEP, StateStore
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import check_complete, has_spec, names_of
from megamult.zero.partition import Partition, Slice
from megamult.zero.whole import WholePartition


@dataclass(frozen=True)
class _Decision:
    """What `step` does with the gradients that are there now."""

    skip: bool
    """Nothing."""
    clip: float = 1.0
    """Factor of all gradients but the multipliers'."""
    clip_multipliers: float = 1.0
    partition: Partition | None = None
    """Partition that the gradients belong to."""


class TwoPhaseOptimizer(torch.optim.Optimizer):
    """Owns norms, clipping, skipping, folded multipliers and state; update rules own the mathematics.

    Outside DeepSpeed gradients must be averaged over data-parallel ranks before `step`, in `.grad` or in `main_grad`,
    where Megatron's DistributedDataParallel leaves them.

    Args:
        groups: from :func:`megamult.param_groups`.
        rule: of every parameter whose kind is not in `rules`.
        rules: by kind of parameter, such as `matrix`.
        clip_grad_norm: threshold of the global norm over everything but the multipliers; 0: none.
        clip_multipliers: clip the multipliers too, by their own norm at the same threshold.
        skip_grad_norm: of the norm that `clip_grad_norm` looks at, above which a step is dropped; 0: never.
        model: whose parameters the groups must hold completely, and whose names messages use; None: not checked.
        folded: multipliers of a model that holds effective weights; None: the model has its own, or none.
        mesh: of the processes; None: as Megatron's groups say, or all processes data-parallel.

    Attributes:
        folding: settings of the folded multipliers; None: there are none.
        folded: the folded multipliers themselves, once the optimizer is bound to a partition.
        norms: of the last prepared gradients, before clipping.
        updates: how many steps were applied: the count that every state of AdamW has.
        skipped_steps: how many steps were dropped because a gradient was not finite, or above `skip_grad_norm`.

    Raises:
        ValueError: a group without kind, with parameters of another kind or of several dtypes; a parameter without
            spec, of another shape than its spec says, or in no group.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rule: UpdateRule,
        rules: Mapping[str, UpdateRule] | None = None,
        *,
        clip_grad_norm: float = 1.0,
        clip_multipliers: bool = False,
        skip_grad_norm: float = 0.0,
        model: torch.nn.Module | None = None,
        folded: FoldedMultipliers | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        self._names = {} if model is None else names_of(model)
        self.mesh = mesh or current_mesh()
        check_groups(groups, self._names, self.mesh.grid)
        held = {parameter for group in groups for parameter in group["params"]}
        check_complete({name for p, name in self._names.items() if p in held}, self._names.values())
        self.rule, self.rules = rule, dict(rules or {})
        # Not torch's defaults, which all groups share: rules may have settings of one name.
        groups = [{**self.rule_of(group["kind"]).defaults, **group} for group in groups]
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.clip_grad_norm = clip_grad_norm
        self.clip_multipliers = clip_multipliers
        self.skip_grad_norm = skip_grad_norm
        self.folding = folded
        self.folded: BoundMultipliers | None = None
        self.norms: Norms | None = None
        self.updates = 0
        self.skipped_steps = 0
        self._store = StateStore(self)
        self._decision: _Decision | None = None  # None: gradients must be prepared before they are applied
        self._bound: Partition | None = None
        self._own: WholePartition | None = None  # of a loop without DeepSpeed
        self._norms: GlobalNorms | None = None  # of the bound partition

    def rule_of(self, kind: str) -> UpdateRule:
        """Return the rule that updates parameters of a kind."""
        return self.rules.get(kind, self.rule)

    def _every_rule(self) -> list[UpdateRule]:
        return [self.rule, *self.rules.values()]

    def _selected_by(self, rule: UpdateRule) -> Callable[[ParameterSpec], bool]:
        """Return the predicate of the parameters that `rule` updates."""
        return lambda spec: self.rule_of(spec.kind) is rule

    @property
    def gradient_norm(self) -> float | None:
        """Over everything but multipliers, of the last prepared gradients before clipping."""
        return None if self.norms is None else self.norms.main

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps of each state now, by the state's name."""
        return self._store.kept(self._every_rule())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Make `step` do nothing: DeepSpeed's constructors call it with zero gradients (ZeRO 0 in bf16), which would
        count as Adam's first step and apply weight decay."""
        self._decision = _Decision(skip=True)
        try:
            yield
        finally:
            self._decision = None

    def bind(self, partition: Partition) -> None:
        """Take the partition whose gradients `prepare` will be given: plan, and lay out what is kept of it."""
        if self._bound is partition:
            return
        if self.folding is not None:
            self.folded = self.folding.bind(partition, self.state)
        self._norms = GlobalNorms(partition)
        for rule in self._every_rule():
            rule.bind(partition, self._selected_by(rule))
        self._store.claim_rows(self._every_rule(), device.local_device())
        self._bound = partition

    def begin(self) -> None:
        """Outside DeepSpeed, before the first forward pass; needed if folded multipliers do not start at 1."""
        self.bind(self._own_partition())

    def _own_partition(self) -> WholePartition:
        """Return the partition of a loop without DeepSpeed, where this optimizer holds the model's own parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        driven = self._bound is not None and self._bound is not self._own
        if driven or not all(has_spec(p) for p in parameters):
            raise RuntimeError(
                "step() without prepare(), on tensors that are not the model's own parameters: under DeepSpeed call "
                "megamult.attach(engine, optimizer) after deepspeed.initialize; in your own loop, make the optimizer "
                "from the model's parameters"
            )
        if self._own is None or len(self._own.slices) != len(parameters):
            numbered = {
                p: self._names.get(p, f"param_groups[{g}]['params'][{i}]")
                for g, group in enumerate(self.param_groups)
                for i, p in enumerate(group["params"])
            }
            self._own = WholePartition(self.param_groups, numbered, self.mesh)
        return self._own

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """Complete the gradients, take their norms, decide on factors; then let the rules prepare their updates.
        Collective over all ranks."""
        self.bind(partition)
        gradients = partition.gradients()
        sum_partial_gradients(partition, gradients)
        if self.folded is not None:
            self.folded.chain_rule(gradients)
        assert self._norms is not None
        self.norms = self._norms(gradients, None if self.folded is None else self.folded.gradient)
        skip = not self.norms.finite or 0 < self.skip_grad_norm < self.norms.main
        self.skipped_steps += skip
        self.updates += not skip
        clip = clip_factor(self.norms.main, self.clip_grad_norm)
        clip_multipliers = clip_factor(self.norms.multipliers, self.clip_grad_norm) if self.clip_multipliers else 1.0
        self._decision = _Decision(skip, clip, clip_multipliers, partition)
        if skip:
            return
        if self.folded is not None:
            self.folded.update(clip_multipliers, self._schedule())
        for rule in self._every_rule():
            rule.prepare(clip, self._store)

    def _schedule(self) -> float:
        """Return the present fraction of the peak learning rate, read off the first group."""
        group = self.param_groups[0]
        return group["lr"] / group["peak_lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what was prepared to the groups that hold gradients now; outside DeepSpeed prepare it first.

        Args:
            closure: as torch's: computes gradients, returns the loss.

        Raises:
            RuntimeError: DeepSpeed calls, and `prepare` was not called for this step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        unprepared = self._decision is None
        if unprepared:
            self.prepare(self._own_partition())
        assert self._decision is not None
        if not self._decision.skip:
            for group in self.param_groups:
                # At ZeRO 3 all groups but the current sub-group's are empty.
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters:
                    with self.folded.latent_weights(parameters) if self.folded else contextlib.nullcontext():
                        self._apply(self._decision, group, parameters)
        if unprepared:
            self.finish()
        return loss

    def _apply(self, decision: _Decision, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update these parameters of a group by the rule of its kind."""
        rule = self.rule_of(group["kind"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if rule.prepares:
            rule.apply(group, parameters, gradients, {})
            return
        clip = decision.clip_multipliers if group["kind"] == "multiplier" else decision.clip
        if clip != 1.0:
            torch._foreach_mul_(gradients, clip)
        kept = [self._store.of_tensor(rule, p) for p in parameters]
        keys = [state.key for state in rule.states] + [STEP] * rule.counts_steps
        rule.apply(group, parameters, gradients, {key: [each[key] for each in kept] for key in keys})

    def finish(self) -> None:
        """Forget what `prepare` decided: the next step must be prepared again."""
        if self._decision is not None and self._decision.partition is not None:
            self._decision.partition.release()
        self._decision = None

    def weight(self, piece: Slice) -> Tensor:
        """[length] of the slice's weights without multipliers, in fp32."""
        return piece.master if self.folded is None else self.folded.latent(piece.tensor, piece.offset, piece.length)

    def views(self, partition: Partition) -> Iterator[tuple[str, Slice, Tensor]]:
        """Views of everything that this rank keeps of its slices, to read and to write in place.

        Yields:
            (name, slice, values): `weight` (without multipliers) or the name of a state of each element, and its
            [length] view. State is zeros where no step was made.
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
        """Views of the state of rows, of the logical matrices that this rank owns: over all ranks each once.

        Yields:
            (name of the state, name of the logical matrix, its [rows] values), to read and to write in place.
        """
        self.bind(partition)
        yield from self._store.all_rows()

    def restored(self, partition: Partition, updates: int, skipped_steps: int) -> None:
        """Go on from what was written to the views of :meth:`views`. Collective over all ranks.

        Args:
            updates: steps that had been applied to that state. AdamW counts them for all alike: state that is new
                among older one takes larger first steps where betas are close to 1.
            skipped_steps: and those that had been dropped.
        """
        self.updates, self.skipped_steps = updates, skipped_steps
        for state in self.state.values():
            if STEP in state:
                state[STEP].fill_(updates)
        if self.folded is not None:
            self.folded.restored(updates)
        partition.publish()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, and in it the values and state of folded multipliers under `folded`, and state of
        rows of matrices under `rows`."""
        self._begin_if_needed()
        found = super().state_dict()
        if self.folded is not None:
            found["folded"] = self.folded.state_dict()
        if self._store.rows:
            found["rows"] = self._store.rows
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned. It has latent weights; the model's own state has the effective ones.

        Raises:
            ValueError: it has folded multipliers and this optimizer none, or the other way round; or it has the state
                of rows of other matrices than this rank owns.
        """
        folded = state_dict.get("folded")
        if (folded is None) != (self.folding is None):
            has, lacks = ("the state", "this optimizer") if self.folding is None else ("this optimizer", "the state")
            raise ValueError(f"{has} has folded multipliers and {lacks} none: load the state of a like optimizer")
        self._begin_if_needed()
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._store.keep_fp32(self._every_rule(), state_dict, parameters)
        self._store.load_rows(state_dict.get("rows", {}))
        if self.folded is not None and folded is not None:
            self.folded.load_state_dict(folded, self.state)  # torch has put another mapping in its place

    def _begin_if_needed(self) -> None:
        """Lay out what is kept beside torch's state, in a loop without DeepSpeed that has not stepped yet."""
        rows = any(state.per == "row" for rule in self._every_rule() for state in rule.states)
        if self._bound is None and (self.folding is not None or rows):
            self.begin()
