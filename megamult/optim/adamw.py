"""AdamW as an update rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from megamult.optim.rule import State, UpdateRule
from megamult.optim.state import STEP


class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101), bias-corrected.

    It uses torch's fused kernels on CUDA and on the CPU. These kernels count steps per parameter. NVIDIA Apex's
    FusedAdam is not used, because it counts steps per param group. ZeRO 3 calls `step` once per sub-group, which would
    advance the count of a param group several times in one optimizer step.

    Args:
        betas: decay rates of the first and the second moment.
        eps: number added to the square root of the second moment.
    """

    states = (State("exp_avg", "exp_avg"), State("exp_avg_sq", "exp_avg_sq"))
    counts_steps = True

    def __init__(self, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        self.defaults = {"betas": betas, "eps": eps, "fused": True}

    def apply(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        state: Mapping[str, list[Tensor]],
    ) -> None:
        """Update the tensors of one param group in place."""
        adamw(
            parameters,
            gradients,
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            state[STEP],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
