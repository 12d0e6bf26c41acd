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

from megamult import device, parallel
from megamult.layout import has_layout, names_of
from megamult.optim.clip import Norms, clip_factor, local_squares
from megamult.optim.param_groups import check_complete, check_groups
from megamult.zero.slices import Partition
from megamult.zero.whole import WholePartition


class TwoPhaseAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) with global clipping that leaves multipliers out.

    The kernels are torch's fused ones, on CUDA and on the CPU, which count steps per parameter. NVIDIA Apex's
    FusedAdam counts per group, and ZeRO 3, calling `step` once per sub-group, would advance it several times.

    Args:
        groups: from :func:`megamult.param_groups`.
        betas, eps: as torch's.
        clip_grad_norm: threshold of the global norm over everything but the multipliers; 0: none.
        clip_multipliers: clip the multipliers too, by their own norm at the same threshold.
        model: whose parameters the groups must hold completely, and whose names messages use; None: not checked.

    Attributes:
        norms: of the last prepared gradients, before clipping.
        skipped_steps: how many steps were dropped because a gradient was not finite.

    Raises:
        ValueError: a group without kind, with parameters of another kind or of several dtypes; a parameter without
            layout, or in no group.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip_grad_norm: float = 1.0,
        clip_multipliers: bool = False,
        model: torch.nn.Module | None = None,
    ) -> None:
        groups = list(groups)
        self._names = {} if model is None else names_of(model)
        check_groups(groups, self._names)
        check_complete(groups, self._names)
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.clip_grad_norm = clip_grad_norm
        self.clip_multipliers = clip_multipliers
        self.norms: Norms | None = None
        self.skipped_steps = 0
        self._factors: tuple[float, float] | None = None  # (all but multipliers, multipliers); None: not prepared
        self._skip = False
        self._paused = False
        self._driven = False  # someone else calls prepare
        self._whole: WholePartition | None = None

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

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """Complete the gradients, take their norms, decide on factors. Collective over all ranks."""
        grid = parallel.grid()
        gradients = partition.gradients()
        sum_partial_gradients(partition, gradients)
        squares = local_squares(partition.slices, gradients, grid.tensor_rank)
        squares = squares.to(device.local_device())  # a rank without slices has made it on the CPU
        if not partition.sharded and grid.data_rank != 0:
            squares.zero_()  # data-parallel replicas count once
        if grid.size > 1:
            torch.distributed.all_reduce(squares)
        main, multipliers = squares.sqrt().tolist()
        self.norms = Norms(main, multipliers)
        self._skip = not self.norms.finite
        self.skipped_steps += self._skip
        self._factors = (
            clip_factor(main, self.clip_grad_norm),
            clip_factor(multipliers, self.clip_grad_norm) if self.clip_multipliers else 1.0,
        )

    def finish(self) -> None:
        """Forget what `prepare` decided: the next step must be prepared again."""
        self._factors = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply what was prepared to the groups that hold gradients now; outside DeepSpeed prepare it first.

        Raises:
            RuntimeError: DeepSpeed calls, and `prepare` was not called for this step.
        """
        if self._paused:
            return
        alone = self._factors is None
        if alone:
            self.prepare(self._own_partition())
        if not self._skip:
            self._apply()
        if alone:
            self.finish()

    def _own_partition(self) -> WholePartition:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self._driven or not all(has_layout(p) for p in parameters):
            raise RuntimeError(
                "step() without prepare(): call megamult.zero.attach.attach(engine, optimizer) after "
                "deepspeed.initialize, or prepare(WholePartition(...)) yourself"
            )
        if self._whole is None or len(self._whole.slices) != len(parameters):
            numbered = {
                p: self._names.get(p, f"param_groups[{g}]['params'][{i}]")
                for g, group in enumerate(self.param_groups)
                for i, p in enumerate(group["params"])
            }
            self._whole = WholePartition(self.param_groups, numbered)
        return self._whole

    def _apply(self) -> None:
        """One update of the groups that hold gradients now."""
        assert self._factors is not None
        for group in self.param_groups:
            factor = self._factors[group["kind"] == "multiplier"]
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients and factor != 1.0:  # at ZeRO 3 all groups but the current sub-group's are empty
                torch._foreach_mul_(gradients, factor)
        super().step()


def sum_partial_gradients(partition: Partition, gradients: list[Tensor]) -> None:
    """Sum, in place, the gradients that are partial over tensor-parallel ranks: one packed collective.

    A replicated parameter's slices are the same on every rank of a tensor-parallel group (shards have equal sizes),
    so the packed buffers line up.
    """
    if parallel.grid().tensor_size == 1:
        return
    partial = [g for piece, g in zip(partition.slices, gradients, strict=True) if piece.layout.partial_over_tp]
    if not partial:
        return
    packed = torch.cat(partial)
    torch.distributed.all_reduce(packed, group=parallel.tensor_group())
    torch._foreach_copy_(partial, list(packed.split([g.numel() for g in partial])))
