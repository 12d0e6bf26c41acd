"""AdamW in two phases, for DeepSpeed: `prepare` sees all reduced gradients once, `step` only applies.

DeepSpeed's ZeRO calls a client optimizer's `step` once per param group (ZeRO 1, 2) or sub-group (ZeRO 3), with that
group's gradient set just before and cleared just after. So whatever needs several groups happens in `prepare`:
completing gradients over tensor-parallel ranks, the norms, the clip factors, the decision to skip a step.

Outside DeepSpeed the parameters are whole and `step` does both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megamult.distributed import device
from megamult.distributed.mesh import Mesh, current_mesh
from megamult.optim.clip import LocalSquares, Norms, clip_factor
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.param_groups import check_groups
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import check_complete, has_spec, names_of
from megamult.zero.partition import Partition, Slice
from megamult.zero.whole import WholePartition


class TwoPhaseAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with global clipping that leaves multipliers out.

    The kernels are torch's fused ones, on CUDA and on the CPU, which count steps per parameter. NVIDIA Apex's
    FusedAdam counts per group, and ZeRO 3, calling `step` once per sub-group, would advance it several times.

    Outside DeepSpeed gradients must be averaged over data-parallel ranks before `step`, in `.grad` or in `main_grad`,
    where Megatron's DistributedDataParallel leaves them.

    Args:
        groups: from :func:`megamult.param_groups`.
        betas, eps: as torch's.
        clip_grad_norm: threshold of the global norm over everything but the multipliers; 0: none.
        clip_multipliers: clip the multipliers too, by their own norm at the same threshold.
        skip_grad_norm: of the norm that `clip_grad_norm` looks at, above which a step is dropped; 0: never.
        model: whose parameters the groups must hold completely, and whose names messages use; None: not checked.
        folded: multipliers of a model that holds effective weights; None: the model has its own, or none.
        mesh: of the processes; None: as Megatron's groups say, or all processes data-parallel.

    Attributes:
        norms: of the last prepared gradients, before clipping.
        updates: how many steps were applied: the count that every state of AdamW has.
        skipped_steps: how many steps were dropped because a gradient was not finite, or above `skip_grad_norm`.

    Raises:
        ValueError: a group without kind, with parameters of another kind or of several dtypes; a parameter without
            layout, of another shape than its layout says, or in no group.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
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
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})
        self.clip_grad_norm = clip_grad_norm
        self.clip_multipliers = clip_multipliers
        self.skip_grad_norm = skip_grad_norm
        self.folded = folded
        self.norms: Norms | None = None
        self.updates = 0
        self.skipped_steps = 0
        self._factors: tuple[float, float] | None = None  # (all but multipliers, multipliers); None: not prepared
        self._skip = False
        self._paused = False
        self._driven = False  # someone else calls prepare
        self._whole: WholePartition | None = None
        self._prepared: Partition | None = None
        self._squares: tuple[Partition, LocalSquares] | None = None

    @property
    def gradient_norm(self) -> float | None:
        """Over everything but multipliers, of the last prepared gradients before clipping."""
        return None if self.norms is None else self.norms.main

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Make `step` do nothing: DeepSpeed's constructors call it with zero gradients (ZeRO 0 in bf16), which would
        count as Adam's first step and apply weight decay."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def bind(self, partition: Partition) -> None:
        """Take note of the partition that `prepare` will be given, by whoever drives the two phases."""
        self._driven = True
        self._fold(partition)

    def begin(self) -> None:
        """Outside DeepSpeed, before the first forward pass; needed if folded multipliers do not start at 1."""
        self._fold(self._own_partition())

    def _fold(self, partition: Partition) -> None:
        if self.folded is not None and self.folded.partition is not partition:
            self.folded.bind(partition, self.state)

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """Complete the gradients, take their norms, decide on factors. Collective over all ranks."""
        self._fold(partition)
        gradients = partition.gradients()
        sum_partial_gradients(partition, gradients)
        if self.folded is not None:
            self.folded.chain_rule(gradients)
        if self._squares is None or self._squares[0] is not partition:
            here = partition.slices[0].tensor.device if partition.slices else device.local_device()
            self._squares = partition, LocalSquares(partition, here)
        squares = self._squares[1](gradients).to(device.local_device())
        partition.mesh.sum_over(squares)
        if self.folded is not None:
            squares[1] += self.folded.gradient.double().square().sum()
        main, multipliers = squares.sqrt().tolist()
        self.norms = Norms(main, multipliers)
        self._skip = not self.norms.finite or 0 < self.skip_grad_norm < main
        self.skipped_steps += self._skip
        self.updates += not self._skip
        self._factors = (
            clip_factor(main, self.clip_grad_norm),
            clip_factor(multipliers, self.clip_grad_norm) if self.clip_multipliers else 1.0,
        )
        self._prepared = partition
        if self.folded is not None and not self._skip:
            self.folded.update(self._factors[1], self._schedule())

    def _schedule(self) -> float:
        """The present fraction of the peak learning rate, read off the first group."""
        group = self.param_groups[0]
        return group["lr"] / group["peak_lr"]

    def finish(self) -> None:
        """Forget what `prepare` decided: the next step must be prepared again."""
        self._factors = None
        if self._prepared is not None:
            self._prepared.release()
            self._prepared = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what was prepared to the groups that hold gradients now; outside DeepSpeed prepare it first.

        Args:
            closure: as torch's: computes gradients, returns the loss.

        Raises:
            RuntimeError: DeepSpeed calls, and `prepare` was not called for this step.
        """
        if self._paused:
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alone = self._factors is None
        if alone:
            self.prepare(self._own_partition())
        if not self._skip:
            for group in self.param_groups:
                # At ZeRO 3 all groups but the current sub-group's are empty.
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters:
                    with self.folded.latent_weights(parameters) if self.folded else contextlib.nullcontext():
                        self._update_group(group, parameters)
        if alone:
            self.finish()
        return loss

    def weight(self, piece: Slice) -> Tensor:
        """[length] of the slice's weights without multipliers, in fp32."""
        return piece.master if self.folded is None else self.folded.latent(piece.tensor, piece.offset, piece.length)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with folded multipliers their values and state besides, under `folded`."""
        found = super().state_dict()
        if self.folded is not None:
            if self.folded.partition is None:
                self.begin()
            found["folded"] = self.folded.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Latent weights are in it; the model's effective ones are in the model's own state.

        Raises:
            ValueError: it has folded multipliers and this optimizer none, or the other way round.
        """
        folded = state_dict.get("folded")
        if (folded is None) != (self.folded is None):
            has, lacks = ("the state", "this optimizer") if self.folded is None else ("this optimizer", "the state")
            raise ValueError(f"{has} has folded multipliers and {lacks} none: load the state of a like optimizer")
        if self.folded is not None and self.folded.partition is None:
            self.begin()
        super().load_state_dict(state_dict)
        if self.folded is not None and folded is not None:
            self.folded.load_state_dict(folded, self.state)  # torch has put another mapping in its place

    def views(self, partition: Partition) -> Iterator[tuple[str, Slice, Tensor]]:
        """Views of everything that this rank keeps of its slices, to read and to write in place.

        Yields:
            (name, slice, values): `weight` (without multipliers), `exp_avg`, `exp_avg_sq` or `momentum`, and its
            [length] fp32 view. State is zeros where no step was made.
        """
        for piece in partition.slices:
            yield "weight", piece, self.weight(piece)
            if self._has_moments(piece.spec):
                state = self._moments(piece.tensor)
                for name in ("exp_avg", "exp_avg_sq"):
                    yield name, piece, state[name].view(-1)[piece.offset : piece.offset + piece.length]

    def restored(self, partition: Partition, updates: int, skipped_steps: int) -> None:
        """What :meth:`views` yields was written to: go on from there. Collective over all ranks.

        Args:
            updates: steps that had been applied to that state. AdamW counts them for all alike: state that is new
                among older one takes larger first steps where betas are close to 1.
            skipped_steps: and those that had been dropped.
        """
        self.updates, self.skipped_steps = updates, skipped_steps
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(updates)
        if self.folded is not None:
            self.folded.restored(updates)
        partition.publish()

    def _has_moments(self, spec: ParameterSpec) -> bool:
        """Whether AdamW updates such a parameter."""
        return True

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a tensor that it updates; zeros at first."""
        state: dict[str, Tensor] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _own_partition(self) -> WholePartition:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self._driven or not all(has_spec(p) for p in parameters):
            raise RuntimeError(
                "step() without prepare(), on parameters that someone else keeps: under DeepSpeed call "
                "megamult.zero.attach.attach(engine, optimizer) after deepspeed.initialize; in a loop of your own give "
                "the optimizer the model's own parameters"
            )
        if self._whole is None or len(self._whole.slices) != len(parameters):
            numbered = {
                p: self._names.get(p, f"param_groups[{g}]['params'][{i}]")
                for g, group in enumerate(self.param_groups)
                for i, p in enumerate(group["params"])
            }
            self._whole = WholePartition(self.param_groups, numbered, self.mesh)
        return self._whole

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """One AdamW update of these parameters of a group, clipped."""
        assert self._factors is not None
        gradients = [p.grad for p in parameters if p.grad is not None]
        factor = self._factors[group["kind"] == "multiplier"]
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        states = [self._moments(p) for p in parameters]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def sum_partial_gradients(partition: Partition, gradients: list[Tensor]) -> None:
    """Sum, in place, the gradients that are partial over tensor-parallel ranks: one packed collective.

    A replicated parameter's slices are the same on every rank of a tensor-parallel group (shards have equal sizes),
    so the packed buffers line up.
    """
    if partition.mesh.size_of("tensor") == 1:
        return
    partial = [g for piece, g in zip(partition.slices, gradients, strict=True) if "tensor" in piece.spec.reduce_over]
    if not partial:
        return
    packed = torch.cat(partial)
    partition.mesh.sum_over(packed, "tensor")
    torch._foreach_copy_(partial, list(packed.split([g.numel() for g in partial])))
