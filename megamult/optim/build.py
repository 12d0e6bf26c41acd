"""A configuration's optimizer and multipliers become the optimizer of a model whose parameters state their layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamult.multipliers.config import MultipliersConfig
from megamult.optim.adamw import TwoPhaseAdamW
from megamult.optim.config import OptimizerConfig
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.muon.rule import DistributedMuon
from megamult.optim.param_groups import param_groups
from megamult.parameters.roles import resolve
from megamult.parameters.spec import Role, Side

_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    model: torch.nn.Module,
    chosen: OptimizerConfig,
    multipliers: MultipliersConfig,
    initial: Callable[[Role, Side], float] = lambda role, side: 1.0,
) -> TwoPhaseAdamW:
    """The optimizer over all trainable parameters of a model; its learning rate is the peak.

    Args:
        model: every trainable parameter states its layout.
        chosen: which optimizer, and its settings; the schedule is the loop's.
        multipliers: folded ones are made here, others are parameters of the model.
        initial: first value of each (role, side) of folded multipliers.

    Raises:
        ValueError: as :func:`megamult.param_groups` and the optimizer's constructor.
    """
    groups = param_groups(
        model,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        multiplier_lr=multipliers.lr,
        multiplier_weight_decay=multipliers.weight_decay,
    )
    common: dict[str, Any] = {
        "betas": chosen.betas,
        "eps": chosen.eps,
        "clip_grad_norm": chosen.clip_grad_norm,
        "clip_multipliers": multipliers.clip,
        "skip_grad_norm": chosen.skip_grad_norm,
        "model": model,
    }
    if multipliers.implementation == "folded":
        common["folded"] = FoldedMultipliers(
            resolve(multipliers.placement),
            lr=chosen.lr if multipliers.lr is None else multipliers.lr,
            weight_decay=multipliers.weight_decay,
            betas=chosen.betas,
            eps=chosen.eps,
            initial=initial,
        )
    if chosen.name == "adamw":
        return TwoPhaseAdamW(groups, **common)
    return DistributedMuon(
        groups,
        momentum=chosen.momentum,
        ns_coefficients=chosen.ns_coefficients,
        ns_dtype=_DTYPES[chosen.ns_dtype],
        exchange_dtype=_DTYPES[chosen.exchange_dtype],
        update_scale=chosen.update_scale,
        **common,
    )
