"""Construction of the optimizer that a configuration asks for, for a model whose parameters have specs."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from megamult.distributed.mesh import Mesh
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.parametrization import PARAMETRIZATIONS
from megamult.optim.adamw import AdamW
from megamult.optim.config import OPTIMIZERS, OptimizerConfig
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.muon.newton_schulz import SCALES
from megamult.optim.param_groups import param_groups
from megamult.optim.qk_clip import MeasuredLogits, QKClip
from megamult.optim.rates import Rate, Rates
from megamult.optim.rule import UpdateRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.initial import Initial
from megamult.parameters.roles import ROLES, TRANSFORMER
from megamult.parameters.stated import named_specs

_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    model: torch.nn.Module,
    chosen: OptimizerConfig,
    multipliers: MultipliersConfig,
    initial: Initial | None = None,
    mesh: Mesh | None = None,
    logits: MeasuredLogits | None = None,
) -> TwoPhaseOptimizer:
    """Make the optimizer of all trainable parameters of a model. Its param groups begin at their peak learning rates.

    Args:
        model: a model whose trainable parameters all have specs.
        chosen: the optimizer's name and settings. The optimizer does not apply the schedule; the training loop does.
        multipliers: settings of the multipliers. Folded multipliers are made here; multipliers of the layer
            implementation are already parameters of the model.
        initial: initial values of the folded multipliers; if None, those in `multipliers`.
        mesh: the mesh of the processes. If None, the mesh is made from the process groups that exist.
        logits: measured attention logits of the model, if `multipliers.qk_clip` is set; None if not.

    Raises:
        ValueError: `multipliers.qk_clip` is set without `logits`, or the reverse; or the optimizer is Muon or NorMuon,
            and would train no matrix. For other errors see
            :func:`rates_of`, :func:`megamult.param_groups` and :class:`TwoPhaseOptimizer`.
    """
    threshold = multipliers.qk_clip
    if (threshold is None) != (logits is None):
        raise ValueError(
            f"multipliers.qk_clip is {threshold} and logits {'None' if logits is None else 'given'}: QK-clip needs a "
            "threshold and measured logits (megamult.models.common.head_logits.HeadLogits); give both, or neither"
        )
    groups = param_groups(
        model,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        multiplier_lr=multipliers.lr,
        multiplier_weight_decay=multipliers.weight_decay,
        multiplier_schedule=multipliers.schedule,
    )
    rates = rates_of(model, chosen, multipliers)
    specs = [spec for _, _, spec in named_specs(model) if spec.side is None]
    present = {part.role for spec in specs for part in spec.parts}
    if multipliers.shared_columns:
        multipliers.check_shared_columns([[part.role for part in spec.parts] for spec in specs])
    parametrization, folded = PARAMETRIZATIONS[multipliers.parametrization], None
    if multipliers.implementation == "folded":
        folded = FoldedMultipliers(
            {role: sides for role, sides in multipliers.sides(ROLES).items() if role in present},
            lr=chosen.lr if multipliers.lr is None else multipliers.lr,
            weight_decay=multipliers.weight_decay,
            initial=initial or multipliers.initial_values(),
            rates=rates,
            shared_columns=multipliers.shared_columns,
            constant_lr=multipliers.schedule == "constant",
            parametrization=parametrization,
            **chosen.keys_of("adamw"),
        )
    made = TwoPhaseOptimizer(
        groups,
        AdamW(**chosen.keys_of("adamw")),
        matrix_rules(chosen),
        clip_grad_norm=chosen.clip_grad_norm,
        clip_multipliers=multipliers.clip,
        skip_grad_norm=chosen.skip_grad_norm,
        rates=rates,
        fixed_norm=multipliers.norm == "fixed",
        parametrization=parametrization,
        qk_clip=None if threshold is None or logits is None else QKClip(threshold, logits),
        model=model,
        folded=folded,
        mesh=mesh,
    )
    idle = [name for name, share in made.ownership.matrices.items() if name != "AdamW" and not share.tensors]
    if idle:
        roles = ", ".join(role for role in TRANSFORMER if ROLES[role].orthogonalized)
        raise ValueError(
            f"optimizer.name is {chosen.name}, and no trainable parameter is a matrix that {idle[0]} trains (roles "
            f"{roles}): use optimizer.name adamw, or give the matrices of the blocks one of these roles"
        )
    return made


def rates_of(model: torch.nn.Module, chosen: OptimizerConfig, multipliers: MultipliersConfig) -> Rates:
    """Return the factors of learning rate and weight decay that a configuration gives to single roles.

    Raises:
        ValueError: the configuration names a role that no trainable parameter of the model has, gives a number to a
            role or side on which the number has no effect, or a number is not finite or has the wrong sign.
    """
    present = {part.role for _, _, spec in named_specs(model) if spec.side is None for part in spec.parts}
    absent = [
        f"optimizer.{key}.{role}"
        for key in ("lr_factors", "weight_decay_factors")
        for role in getattr(chosen, key)
        if role not in present
    ]
    absent += [
        f"multipliers.{key}.{role}"
        for key in ("lr_factors", "weight_decay_factors", "initial")
        for role in getattr(multipliers, key)
        if role not in present
    ]
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: no trainable parameter of the model has the role that the key names; leave the key "
            f"out, or use one of {', '.join(sorted(present))}"
        )
    sides = {role: each for role, each in multipliers.sides(ROLES).items() if role in present}
    if wrong := [*chosen.role_mistakes(present), *multipliers.by_side_mistakes(sides)]:
        raise ValueError("; ".join(wrong))
    lr, decay = multipliers.by_side("lr_factors"), multipliers.by_side("weight_decay_factors")
    return Rates(
        {
            role: Rate(chosen.lr_factors.get(role, 1.0), chosen.weight_decay_factors.get(role, 1.0))
            for role in {**chosen.lr_factors, **chosen.weight_decay_factors}
        },
        {side: Rate(lr.get(side, 1.0), decay.get(side, 1.0)) for side in {**lr, **decay}},
    )


def matrix_rules(chosen: OptimizerConfig) -> dict[str, UpdateRule]:
    """Return the update rules that replace AdamW, by kind of parameter.

    The result has one rule, for the kind `matrix` (matrices of the transformer blocks). It is empty if AdamW updates
    these too.
    """
    choice = OPTIMIZERS[chosen.name]
    if choice.rule is None:
        return {}
    keys = {key: value for name in choice.sections if name != "adamw" for key, value in chosen.keys_of(name).items()}
    settings = {key: _DTYPES[value] if key.endswith("_dtype") else value for key, value in keys.items()}
    module, _, name = choice.rule.partition(":")
    return {"matrix": getattr(importlib.import_module(module), name)(**settings)}


def update_norm(chosen: OptimizerConfig) -> Callable[[int, int], float] | None:
    """Return the function from a matrix's shape (rows, columns) to the spectral norm of its update at learning rate 1,
    or None for AdamW, whose updates have no known norm."""
    if chosen.name == "adamw":
        return None
    # NorMuon's updates have the same RMS as Muon's with the scale `match_rms_adamw`. The singular values of one update
    # are about equal, so that the spectral norm is about the same too.
    return SCALES["match_rms_adamw" if chosen.muon is None else chosen.muon.scale]
