"""Param groups, one for each kind of parameter.

The spec of a parameter states its kind, so each trainable parameter is in exactly one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from megamult.parameters.axes import Grid
from megamult.parameters.stated import named_specs, spec_of, stored_shape

_FIRST = ("matrix", "multiplier", "undecayed")
"""Kinds of the first groups, in order. Groups of other kinds follow in the model's order of parameters. The order of
groups decides where ZeRO cuts its flat buffers, and with it the order in which floating-point sums are taken."""


def param_groups(
    model: torch.nn.Module,
    *,
    lr: float,
    weight_decay: float,
    multiplier_lr: float | None = None,
    multiplier_weight_decay: float = 2e-3,
    multiplier_schedule: Literal["same", "constant"] = "same",
) -> list[dict[str, Any]]:
    """Return the param groups for megamult's optimizers, one for each kind (:attr:`ParameterSpec.kind`) in the model.

    Args:
        model: a model whose trainable parameters all have specs.
        lr: peak learning rate.
        weight_decay: decoupled weight decay of matrices, embedding and head. Parameters of kind `undecayed`, such as
            weights of norms, have none.
        multiplier_lr: peak learning rate of multipliers; `lr` if None.
        multiplier_weight_decay: decoupled weight decay of multipliers, 2e-3 in arXiv 2601.04890.
        multiplier_schedule: `same` if the schedule also scales the learning rate of multipliers; `constant` if this
            learning rate stays at its peak.

    Returns:
        Groups with the keys `params`, `kind`, `lr`, `peak_lr`, `weight_decay` and `schedule`. `lr` begins at `peak_lr`;
        :func:`set_lr_factor` changes it.

    Raises:
        ValueError: a parameter has no spec.
    """
    members: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in _FIRST}
    for _, parameter, spec in named_specs(model):
        members.setdefault(spec.kind, []).append(parameter)
    decay = {"undecayed": 0.0, "multiplier": multiplier_weight_decay}
    rate = {"multiplier": lr if multiplier_lr is None else multiplier_lr}
    return [
        {
            "params": parameters,
            "kind": kind,
            "lr": rate.get(kind, lr),
            "peak_lr": rate.get(kind, lr),
            "weight_decay": decay.get(kind, weight_decay),
            "schedule": multiplier_schedule if kind == "multiplier" else "same",
        }
        for kind, parameters in members.items()
        if parameters
    ]


def set_lr_factor(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak, or to its peak if the group's schedule is constant."""
    for group in groups:
        group["lr"] = group["peak_lr"] * (1.0 if group.get("schedule") == "constant" else factor)


def check_groups(groups: Sequence[Mapping[str, Any]], names: Mapping[torch.nn.Parameter, str], grid: Grid) -> None:
    """Check the properties of param groups that megamult's optimizers rely on.

    Each group has a kind, and the specs of its parameters state the same kind. Each parameter has the local shape that
    its spec gives for `grid`. All parameters of a group have the same dtype.

    Args:
        groups: param groups as a user gives them, before ZeRO replaces their parameters.
        names: names of parameters, for messages. A parameter without a name here is named by its group and index.
        grid: the grid of the processes.

    Raises:
        ValueError: a group or a parameter lacks one of these properties.
    """
    for g, group in enumerate(groups):
        kind, parameters = group.get("kind"), group["params"]
        if not isinstance(kind, str):
            raise ValueError(
                f"param_groups[{g}] has the kind {kind!r}: make the groups with megamult.param_groups(model, ...), or "
                "give each group the kind that the specs of its parameters state"
            )
        for i, parameter in enumerate(parameters):
            name = names.get(parameter, f"param_groups[{g}]['params'][{i}]")
            spec = spec_of(parameter, name)
            if spec.kind != kind:
                raise ValueError(
                    f"{name} is of kind {spec.kind}, and param_groups[{g}] is of kind {kind}: move it to a group "
                    "of its own kind, or correct its spec"
                )
            shape = stored_shape(parameter)
            if shape != spec.local_shape(grid):
                raise ValueError(
                    f"{name} has the shape {shape}, and its spec at tensor parallel {grid.tensor} says "
                    f"{spec.local_shape(grid)}: correct its spec"
                )
            if parameter.dtype != parameters[0].dtype:
                first = names.get(parameters[0], f"param_groups[{g}]['params'][0]")
                raise ValueError(
                    f"param_groups[{g}] mixes dtypes: {first} is {parameters[0].dtype}, {name} is {parameter.dtype}; "
                    "a group is one flat buffer under ZeRO: convert one of them, or make two groups"
                )
