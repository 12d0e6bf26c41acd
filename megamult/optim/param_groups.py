"""Param groups by kind, read from the layouts: every trainable parameter in exactly one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from megamult.parameters.spec import Kind, named_specs, spec_of


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
    for name, parameter, spec in named_specs(model):
        if spec.kind == "matrix" and len(spec.shape) != 2:
            raise ValueError(
                f"{name} is of kind matrix with the global shape {spec.shape}: a matrix has two dimensions; give "
                "its layout the kind norm or multiplier"
            )
        members[spec.kind].append(parameter)
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


def check_groups(groups: Sequence[Mapping[str, Any]], names: Mapping[torch.nn.Parameter, str], tp_size: int) -> None:
    """What our optimizers rely on: kinds stated and true, one dtype per group.

    Args:
        groups: as a user gives them, before ZeRO replaces their parameters.
        names: of parameters, for messages; those of groups are numbered where a name is missing.
        tp_size: tensor-parallel size.

    Raises:
        ValueError: fact, value, remedy.
    """
    for g, group in enumerate(groups):
        kind, parameters = group.get("kind"), group["params"]
        if kind not in get_args(Kind):
            raise ValueError(
                f"param_groups[{g}] has the kind {kind!r}: use one of {', '.join(get_args(Kind))}, or make the groups "
                "with megamult.param_groups(model, ...)"
            )
        for i, parameter in enumerate(parameters):
            name = names.get(parameter, f"param_groups[{g}]['params'][{i}]")
            spec = spec_of(parameter, name)
            if spec.kind != kind:
                raise ValueError(
                    f"{name} is of kind {spec.kind} and in param_groups[{g}] of kind {kind}: move it to a group of "
                    "its own kind, or attach the layout that it has"
                )
            if kind == "matrix" and any(len(part.shape) != 2 for part in spec.parts):
                shapes = ", ".join(str(part.shape) for part in spec.parts)
                raise ValueError(
                    f"{name} is of kind matrix with the logical shape {shapes}: a matrix has two dimensions; give its "
                    "layout the kind norm or multiplier"
                )
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves the shape (0,)
            if shape != spec.local_shape(tp_size):
                raise ValueError(
                    f"{name} has the shape {shape}, and its layout at tensor parallel {tp_size} says "
                    f"{spec.local_shape(tp_size)}: attach the layout that it has"
                )
            if kind == "matrix" and sum(run.length for run in spec.segments) != spec.shape[0]:
                raise ValueError(
                    f"{name} is of kind matrix with {spec.shape[0]} rows, of which its logical matrices cover "
                    f"{sum(run.length for run in spec.segments)}: it has no padding; give the rest a part of its own"
                )
            if parameter.dtype != parameters[0].dtype:
                first = names.get(parameters[0], f"param_groups[{g}]['params'][0]")
                raise ValueError(
                    f"param_groups[{g}] mixes dtypes: {first} is {parameters[0].dtype}, {name} is {parameter.dtype}; "
                    "a group is one flat buffer under ZeRO: convert one of them, or make two groups"
                )
