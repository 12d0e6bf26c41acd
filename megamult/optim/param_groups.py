"""Param groups by kind, read from the layouts: every trainable parameter in exactly one group."""

from __future__ import annotations

from typing import Any, get_args

import torch

from megamult.layout import Kind, named_layouts


def param_groups(
    model: torch.nn.Module,
    *,
    lr: float,
    weight_decay: float,
    multiplier_lr: float | None = None,
    multiplier_weight_decay: float = 2e-3,
) -> list[dict[str, Any]]:
    """Groups for our optimizers, one per kind that the model has.

    Args:
        model: every trainable parameter states its layout.
        lr: peak learning rate.
        weight_decay: decoupled, of matrices, embedding and head; norms have none.
        multiplier_lr: of multipliers; None: `lr`.
        multiplier_weight_decay: of multipliers, 2e-3 in arXiv 2601.04890.

    Returns:
        Groups with `params`, `kind`, `lr`, `peak_lr` (what a schedule scales) and `weight_decay`.

    Raises:
        ValueError: a parameter without layout, or a one-dimensional matrix.
    """
    members: dict[Kind, list[torch.nn.Parameter]] = {kind: [] for kind in get_args(Kind)}
    for name, parameter, layout in named_layouts(model):
        if layout.kind == "matrix" and len(layout.shape) != 2:
            raise ValueError(
                f"{name} is of kind matrix with the global shape {layout.shape}: a matrix has two dimensions; give "
                "its layout the kind norm or multiplier"
            )
        members[layout.kind].append(parameter)
    decay = {"norm": 0.0, "multiplier": multiplier_weight_decay}
    rate = {"multiplier": lr if multiplier_lr is None else multiplier_lr}
    return [
        {
            "params": parameters,
            "kind": kind,
            "lr": rate.get(kind, lr),
            "peak_lr": rate.get(kind, lr),
            "weight_decay": decay.get(kind, weight_decay),
        }
        for kind, parameters in members.items()
        if parameters
    ]
