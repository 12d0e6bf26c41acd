"""An optimizer that works in two phases under DeepSpeed: `prepare` reads all gradients, then `step` applies updates.

DeepSpeed's ZeRO calls a client optimizer's `step` once per param group (ZeRO 1, 2) or sub-group (ZeRO 3). It sets the
gradient of that group just before the call and clears it just after. All computations that need several groups are
therefore in `prepare`: sums of partial gradients over ranks, norms, clip factors, the decision to skip a step, and what
update rules compute on whole matrices.

Outside DeepSpeed, `step` calls `prepare` itself.
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
from megamult.multipliers.config import CLIP_OF_BOOL, MultiplierClip
from megamult.multipliers.parametrization import Parametrization
from megamult.optim.clip import Clipping, Norms
from megamult.optim.fixed_norm import FixedNorms
from megamult.optim.folded import BoundMultipliers, FoldedMultipliers
from megamult.optim.ownership import ownership
from megamult.optim.param_groups import check_groups
from megamult.optim.qk_clip import QKClip
from megamult.optim.rates import Rates, Stretch, apply_by_rate, learning_rates, stretches_of_tensors
from megamult.optim.reduction import GlobalNorms, PartialGradients
from megamult.optim.rule import UpdateRule
from megamult.optim.state import STEP, StateStore
from megamult.optim.viewed import ViewedOptimizer
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import check_complete, has_spec, names_of, spec_of
from megamult.zero.partition import Partition
from megamult.zero.whole import WholePartition


@dataclass(frozen=True)
class _Decision:
    """Decision of `prepare` on what `step` does with the prepared gradients."""

    skip: bool
    """Whether `step` does nothing."""
    clip: tuple[float, float] = (1.0, 1.0)
    """Two factors: for the gradients of all parameters except multipliers, and for those of multipliers."""
    partition: Partition | None = None
    """Partition that the gradients are from; None if no gradients were prepared."""


class TwoPhaseOptimizer(ViewedOptimizer):
    """Optimizer that does everything except the mathematics of updates, which is in its update rules.

    It computes norms, clips gradients, skips steps, applies folded multipliers, and creates, saves and restores state.
    Outside DeepSpeed, gradients must be averaged over data-parallel ranks before `step`. They are read from `.grad`, or
    from `main_grad`, in which Megatron's DistributedDataParallel leaves them.

    Args:
        groups: param groups, made by :func:`megamult.param_groups`.
        rule: the update rule of every parameter whose kind is not in `rules`.
        rules: update rules by kind of parameter, such as `matrix`.
        clip_grad_norm: global norm to which larger gradients are scaled down; 0 means no clipping. It is the norm over
            all parameters except multipliers, or over all parameters if `clip_multipliers` is `joint`.
        clip_multipliers: norm that clips the multipliers' gradients: none (`out` or False), that of the gradients of
            all multipliers (`own` or True), or that of all gradients (`joint`); see
            :data:`megamult.multipliers.config.MultiplierClip`.
        skip_grad_norm: a step is skipped if the norm that `clip_grad_norm` limits is above this value before clipping;
            0 means no limit.
        rates: factors of learning rate and weight decay of single roles; None if there are none.
        fixed_norm: whether the matrices of kind `matrix` keep their initial Frobenius norms and have no weight decay.
        parametrization: variable that the optimizer trains in place of each multiplier of the layers; None means the
            multiplier itself. For folded multipliers, `folded` states this variable.
        qk_clip: QK-clip, which scales row multipliers of Q and K after an update; None if it is not used.
        model: the model, for names in messages and for a check that the groups hold all of its trainable parameters.
            If None, the check is left out.
        folded: settings of folded multipliers; None if the model has none.
        mesh: the mesh of the processes. If None, the mesh is made from Megatron's process groups, or has all processes
            along the data axis if Megatron has none.

    Attributes:
        ownership: number of tensors and elements that each rule trains.
        folding: the argument `folded`.
        folded: the folded multipliers themselves; None before :meth:`bind`, or if there are none.
        norms: norms of the last prepared gradients, before clipping.
        qk_clip: QK-clip; None if there is none.
        updates: number of steps that were applied, which is also AdamW's count for every tensor.
        skipped_steps: number of steps skipped because a gradient was not finite or the norm was above `skip_grad_norm`.

    Raises:
        ValueError: a group has no kind, or has parameters of another kind or of several dtypes; or a parameter has no
            spec, has another shape than its spec says, or is in no group.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rule: UpdateRule,
        rules: Mapping[str, UpdateRule] | None = None,
        *,
        clip_grad_norm: float = 1.0,
        clip_multipliers: MultiplierClip | bool = "out",
        skip_grad_norm: float = 0.0,
        rates: Rates | None = None,
        fixed_norm: bool = False,
        parametrization: Parametrization | None = None,
        qk_clip: QKClip | None = None,
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
        self.ownership = ownership([spec_of(p) for g in groups for p in g["params"]], rule, self.rules, folded)
        # Each group gets its rule's defaults. torch's `defaults` hold for all groups, but two rules may have settings
        # of the same name.
        groups = [{**self.rule_of(group["kind"]).defaults, **group} for group in groups]
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        if isinstance(clip_multipliers, bool):
            clip_multipliers = CLIP_OF_BOOL[clip_multipliers]
        self.clipping = Clipping(clip_grad_norm, clip_multipliers, skip_grad_norm)
        self.rates = rates or Rates()
        self._fixed_norm, self._parametrization = fixed_norm, parametrization
        self._no_decay_of_fixed()
        self.fixed: FixedNorms | None = None
        self.qk_clip = qk_clip
        self.folding = folded
        self.folded: BoundMultipliers | None = None
        self.norms: Norms | None = None
        self.updates = 0
        self.skipped_steps = 0
        self._store = StateStore(self)
        self._decision: _Decision | None = None  # None if no gradients are prepared
        self._bound: Partition | None = None
        self._own: WholePartition | None = None  # the partition in a loop without DeepSpeed
        self._partial: PartialGradients | None = None  # sums partial gradients of the bound partition
        self._norms: GlobalNorms | None = None  # computes norms of the bound partition
        self._stretches: dict[Tensor, list[Stretch]] = {}  # of the bound partition; see `stretches_of_tensors`

    def rule_of(self, kind: str) -> UpdateRule:
        """Return the rule that updates the parameters of this kind."""
        return self.rules.get(kind, self.rule)

    def _every_rule(self) -> list[UpdateRule]:
        return [self.rule, *self.rules.values()]

    def _selected_by(self, rule: UpdateRule) -> Callable[[ParameterSpec], bool]:
        """Return a function that takes a parameter's spec and returns whether `rule` updates the parameter."""
        return lambda spec: self.rule_of(spec.kind) is rule

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the last prepared gradients of all parameters except multipliers, before clipping.

        None before the first call of :meth:`prepare`.
        """
        return None if self.norms is None else self.norms.main

    @property
    def finite(self) -> bool:
        """Whether all gradients that the last :meth:`prepare` read are finite; True before its first call."""
        return self.norms is None or self.norms.finite

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the present step: one for each kind of parameter, and one for each role, or side of a role,
        that has its own factor of the learning rate or weight decay.

        The optimizer must be bound to a partition.
        """
        of_kind = {group["kind"]: group["lr"] for group in self.param_groups}
        if self.folded is not None:
            of_kind["multiplier"] = self.folded.lr(self._schedule())
        assert self._bound is not None
        return learning_rates(of_kind, self._bound, self.rates)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Make `step` do nothing inside the context.

        At ZeRO 0 in bf16, DeepSpeed's constructor calls `step` with zero gradients. Outside this context, that call
        raises an error, because no gradients have been prepared.
        """
        self._decision = _Decision(skip=True)
        try:
            yield
        finally:
            self._decision = None

    def bind(self, partition: Partition) -> None:
        """Make the optimizer work on a partition; does nothing if it already does.

        This creates folded multipliers, fixed norms and new per-row state, and gives the partition to QK-clip, the
        gradient norms and the update rules. All ranks must call this together.

        Raises:
            ValueError: the multipliers have a parametrization, and one of them is not positive; a matrix whose norm is
                to stay fixed is 0; QK-clip finds no trained row multipliers of Q; or the master of a folded matrix is
                not in fp32.
        """
        if self._bound is partition:
            return
        if self.folding is not None:
            self.folded = self.folding.bind(partition, self.state)
        self._check_multipliers(partition)
        if self.qk_clip is not None:
            self.qk_clip.bind(partition, self.rates, self.folded)
        self._norms = GlobalNorms(partition, self.rates)
        self._partial = PartialGradients(partition)
        self._stretches = stretches_of_tensors(partition, self.rates)
        for rule in self._every_rule():
            rule.bind(partition, self._selected_by(rule))
        self._store.claim_rows(self._every_rule(), device.local_device())
        if self._fixed_norm:
            self.fixed = FixedNorms(partition, lambda spec: spec.kind == "matrix", self.weight)
        self._bound = partition

    def begin(self) -> None:
        """Set the model's weights to the effective weights W_eff.

        A training loop without DeepSpeed calls this before the first forward pass if a folded multiplier does not start
        at 1.
        """
        self.bind(self._own_partition())

    def _own_partition(self) -> WholePartition:
        """Return the partition for a loop without DeepSpeed, in which the param groups hold the model's parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        driven = self._bound is not None and self._bound is not self._own
        if driven or not all(has_spec(p) for p in parameters):
            raise RuntimeError(
                "this call is for a loop without DeepSpeed, but the optimizer is attached to an engine, or its param "
                "groups hold other tensors than the model's parameters: under DeepSpeed call megamult.attach(engine, "
                "optimizer) after deepspeed.initialize, and leave step() to the engine; in your own loop, make the "
                "optimizer from the model's parameters"
            )
        if self._own is None or len(self._own.slices) != len(parameters):
            self._own = WholePartition(self.param_groups, self._names, self.mesh)
        return self._own

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """Sum partial gradients, compute norms and clip factors, and decide whether to skip the step.

        Unless the step is skipped, also update folded multipliers, and call :meth:`UpdateRule.prepare` of all rules.
        All ranks must call this together.
        """
        self.bind(partition)
        gradients = partition.gradients()
        assert self._partial is not None and self._norms is not None
        self._partial(gradients)
        if self.folded is not None:
            self.folded.chain_rule(gradients)
        if self._parametrization is not None:
            for piece, gradient in zip(partition.slices, gradients, strict=True):
                if piece.spec.side is not None:
                    gradient.mul_(self._parametrization.slope(self.weight(piece)))
        self.norms = self._norms(gradients, None if self.folded is None else self.folded.gradient)
        skip = self.clipping.skips(self.norms)
        self.skipped_steps += skip
        self.updates += not skip
        clip, clip_multipliers = self.clipping.factors(self.norms)
        self._decision = _Decision(skip, (clip, clip_multipliers), partition)
        if self.qk_clip is not None:
            self.qk_clip.decide(partition.mesh, skip)
        if skip:
            return
        if self.folded is not None:
            self.folded.update(clip_multipliers, self._schedule())
            if self.qk_clip is not None:
                self.qk_clip.scale([self.folded.values])  # W_eff is computed from them at the end of the step
        for rule in self._every_rule():
            rule.prepare(clip, self._store)

    def _schedule(self) -> float:
        """Return the learning rate as a fraction of its peak, read from the first group."""
        group = self.param_groups[0]
        return group["lr"] / group["peak_lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have gradients. Outside DeepSpeed, this calls :meth:`prepare` first.

        Args:
            closure: function that computes gradients and returns the loss, as in torch's optimizers.

        Raises:
            RuntimeError: the optimizer is under DeepSpeed, and :meth:`prepare` was not called for this step.
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
                # At ZeRO 3, only the group of the current sub-group has gradients.
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters:
                    with self._trained(group["kind"], parameters):
                        self._apply(self._decision, group, parameters)
                        if self.fixed is not None and group["kind"] == "matrix":
                            self.fixed.project(parameters)
                    if self.qk_clip is not None:
                        self.qk_clip.scale(parameters)
        if unprepared:
            self.finish()
        return loss

    def _trained(self, kind: str, parameters: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which these parameters hold the values that their rule updates.

        These values are the latent weights of folded matrices (W, without multipliers) and, under a parametrization,
        the variables of multipliers. All other parameters keep the values that they have outside the context.

        Args:
            kind: kind of the parameters.
            parameters: tensors of one param group.
        """
        if kind == "multiplier" and self._parametrization is not None:
            return self._parametrization.variables(parameters)
        return self.folded.latent_weights(parameters) if self.folded else contextlib.nullcontext()

    def _apply(self, decision: _Decision, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update these parameters of a group with the rule for the group's kind."""
        rule = self.rule_of(group["kind"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if rule.prepares:
            apply_by_rate(rule, group, parameters, gradients, {}, self._stretches)
            return
        clip = decision.clip[group["kind"] == "multiplier"]
        if clip != 1.0:
            torch._foreach_mul_(gradients, clip)
        kept = [self._store.of_tensor(rule, p) for p in parameters]
        keys = [state.key for state in rule.states] + [STEP] * rule.counts_steps
        states = {key: [each[key] for each in kept] for key in keys}
        apply_by_rate(rule, group, parameters, gradients, states, self._stretches)

    def finish(self) -> None:
        """End the step: discard the decision of `prepare`, so that the next step needs a new call of `prepare`."""
        if self._decision is not None and self._decision.partition is not None:
            self._decision.partition.release()
        self._decision = None
