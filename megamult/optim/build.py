"""Construction of the optimizer that a configuration asks for, for a model whose parameters have specs."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from megamult.distributed.mesh import Mesh
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.adamw import AdamW
from megamult.optim.config import OPTIMIZERS, OptimizerConfig
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.param_groups import param_groups
from megamult.optim.rule import UpdateRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.roles import resolve
from megamult.parameters.spec import Role, Side

_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    model: torch.nn.Module,
    chosen: OptimizerConfig,
    multipliers: MultipliersConfig,
    initial: Callable[[Role, Side], float] = lambda role, side: 1.0,
    mesh: Mesh | None = None,
) -> TwoPhaseOptimizer:
    """Make the optimizer of all trainable parameters of a model; its groups begin at their peak learning rate.

    Args:
        model: a model whose trainable parameters all have specs.
        chosen: the optimizer's name and settings. The training loop applies the schedule, not the optimizer.
        multipliers: settings of the multipliers. Folded multipliers are made here; multipliers of the layer
            implementation are already parameters of the model.
        initial: function from (role, side) to the initial value of the folded multipliers there.
        mesh: the mesh of the processes. If None, the mesh is made from the process groups that exist.

    Raises:
        ValueError: see :func:`megamult.param_groups` and the optimizer's constructor.
    """
    groups = param_groups(
        model,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        multiplier_lr=multipliers.lr,
        multiplier_weight_decay=multipliers.weight_decay,
    )
    folded = None
    if multipliers.implementation == "folded":
        folded = FoldedMultipliers(
            resolve(multipliers.placement),
            lr=chosen.lr if multipliers.lr is None else multipliers.lr,
            weight_decay=multipliers.weight_decay,
            initial=initial,
            **chosen.keys_of("adamw"),
        )
    return TwoPhaseOptimizer(
        groups,
        AdamW(**chosen.keys_of("adamw")),
        matrix_rules(chosen),
        clip_grad_norm=chosen.clip_grad_norm,
        clip_multipliers=multipliers.clip,
        skip_grad_norm=chosen.skip_grad_norm,
        model=model,
        folded=folded,
        mesh=mesh,
    )


def matrix_rules(chosen: OptimizerConfig) -> dict[str, UpdateRule]:
    """Return the update rules that replace AdamW, by kind of parameter.

    The result has a rule for `matrix`, the matrices of the transformer blocks, or is empty if AdamW updates these too.
    """
    choice = OPTIMIZERS[chosen.name]
    if choice.rule is None:
        return {}
    keys = {key: value for name in choice.sections if name != "adamw" for key, value in chosen.keys_of(name).items()}
    settings = {key: _DTYPES[value] if key.endswith("_dtype") else value for key, value in keys.items()}
    module, _, name = choice.rule.partition(":")
    return {"matrix": getattr(importlib.import_module(module), name)(**settings)}
