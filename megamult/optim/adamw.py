"""AdamW in two phases, for DeepSpeed: `prepare` sees all reduced gradients once, `step` only applies.

DeepSpeed's ZeRO calls a client optimizer's `step` once per param group (ZeRO 1, 2) or sub-group (ZeRO 3), with that
group's gradient set just before and cleared just after. So whatever needs several groups happens in `prepare`:
completing gradients over tensor-parallel ranks, the norms, the clip factors, the decision to skip a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamult import device, parallel
from megamult.optim.clip import Norms, clip_factor, local_squares
from megamult.zero.slices import Partition


class TwoPhaseAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) with global clipping that leaves multipliers out.

    The kernels are torch's fused ones, on CUDA and on the CPU, which count steps per parameter. NVIDIA Apex's
    FusedAdam counts per group, and ZeRO 3, calling `step` once per sub-group, would advance it several times.

    Args:
        groups: from :func:`megamult.param_groups`.
        betas, eps: as torch's.
        clip_grad_norm: threshold of the global norm over everything but the multipliers; 0: none.
        clip_multipliers: clip the multipliers too, by their own norm at the same threshold.

    Attributes:
        norms: of the last prepared gradients, before clipping.
        skipped_steps: how many steps were dropped because a gradient was not finite.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip_grad_norm: float = 1.0,
        clip_multipliers: bool = False,
    ) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.clip_grad_norm = clip_grad_norm
        self.clip_multipliers = clip_multipliers
        self.norms: Norms | None = None
        self.skipped_steps = 0
        self._factors: tuple[float, float] | None = None  # (all but multipliers, multipliers); None: not prepared
        self._skip = False
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Make `step` do nothing: DeepSpeed's constructors call it with zero gradients (ZeRO 0 in bf16), which would
        count as Adam's first step and apply weight decay."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """Complete the gradients, take their norms, decide on factors. Collective over all ranks."""
        gradients = partition.gradients()
        sum_partial_gradients(partition, gradients)
        squares = local_squares(partition.slices, gradients, parallel.tensor_group().rank())
        squares = squares.to(device.local_device())  # a rank without slices has made it on the CPU
        if not partition.sharded and parallel.data_group().rank() != 0:
            squares.zero_()  # data-parallel replicas count once
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
        """Apply AdamW to the groups that hold gradients now.

        Raises:
            RuntimeError: `prepare` was not called for this step.
        """
        if self._paused:
            return
        if self._factors is None:
            raise RuntimeError(
                "step() without prepare(): call megamult.zero.attach.attach(engine, optimizer) after "
                "deepspeed.initialize, or prepare(WholePartition(...)) yourself"
            )
        if self._skip:
            return
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
    group = parallel.tensor_group()
    if group.size() == 1:
        return
    partial = [g for piece, g in zip(partition.slices, gradients, strict=True) if piece.layout.partial_over_tp]
    if not partial:
        return
    packed = torch.cat(partial)
    torch.distributed.all_reduce(packed, group=group)
    torch._foreach_copy_(partial, list(packed.split([g.numel() for g in partial])))
