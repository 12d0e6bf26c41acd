"""Multipliers for a model that someone else wrote, in three lines of its DeepSpeed script."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.nn import Parameter

from megamult.distributed.mesh import current_mesh
from megamult.integrations.rules import Rule, one_tensor
from megamult.multipliers.config import MultipliersConfig
from megamult.optim import legacy
from megamult.optim.build import make_optimizer
from megamult.optim.config import OptimizerConfig, check_used, rule_sections
from megamult.optim.folded import covers
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.roles import ROLES, Placement, resolve
from megamult.parameters.spec import ParameterSpec, Role, Side
from megamult.parameters.stated import has_spec, set_spec, spec_of, stored_shape


def fold(
    optimizer: OptimizerConfig | Mapping[str, Any],
    model: torch.nn.Module,
    rules: Mapping[str, Rule],
    *,
    placement: str | Mapping[str, str | Sequence[str]] = "all",
    multiplier_lr: float | None = None,
    multiplier_weight_decay: float = 2e-3,
    clip_multipliers: bool = False,
    initial: float | Callable[[Role, Side], float] = 1.0,
) -> TwoPhaseOptimizer:
    """Make an optimizer that gives an unmodified model learnable multipliers (arXiv 2601.04890), and trains both.

    The model keeps effective weights W_eff = diag(r) W diag(c) and runs as before; the optimizer keeps W, r and c
    (:mod:`megamult.optim.folded`). Under DeepSpeed::

        optimizer = megamult.fold({"name": "muon", "lr": 1e-3}, model, megamult.LLAMA_RULES)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        megamult.attach(engine, optimizer)

    `settings` needs ``"zero_allow_untested_optimizer": true`` and ``"gradient_clipping": 0.0`` (DeepSpeed's default is
    1.0, and the optimizer clips already, by `clip_grad_norm`). At ZeRO 0 in bf16, call initialize within
    ``optimizer.paused()``. In a loop without DeepSpeed, average gradients over ranks and call ``optimizer.step()``; if
    `initial` is not 1, call ``optimizer.begin()`` before the first step.

    A vector that no rule names (weights of norms, biases) gets the role norm: AdamW without weight decay. A parameter
    that has a spec already, like those of megamult's own modules, needs no rule.

    Args:
        optimizer: keys of the section `optimizer` of a run, like ``{"name": "muon", "muon": {"momentum": 0.9}}``, but
            not those of the schedule. A scheduler of DeepSpeed or torch that scales `lr` of the optimizer's groups
            schedules the multipliers too.
        model: the model as built, also under `deepspeed.zero.Init`; for a Megatron model, process groups are set up.
        rules: mapping from a regular expression, searched in parameters' names, to a role, a spec, or a function from a
            parameter to its spec. Ready-made: :data:`megamult.LLAMA_RULES`, :func:`megamult.megatron_rules`.
        placement: `all`, `symmetry_free`, `scalar`, or a mapping from role to row, col or scalar.
        multiplier_lr: peak learning rate of multipliers; None: the optimizer's.
        multiplier_weight_decay: decoupled weight decay of multipliers.
        clip_multipliers: whether to clip the multipliers' gradient, by its own norm.
        initial: initial value of all multipliers, or a function of role and side. A value other than 1 rescales the
            model's present weights.

    Returns:
        The optimizer: AdamW, or another rule for the matrices and AdamW for all else. Its `folded` holds the
        multipliers.

    Raises:
        ValueError: a key or value is unknown; a rule finds no parameter; two rules find the same parameter, or none
            finds a matrix; multipliers would scale a frozen parameter, one tied to another role, or nothing at all.
    """
    chosen = _optimizer_config(optimizer)
    sides: Any = placement if isinstance(placement, str) else {r: _listed(s) for r, s in placement.items()}
    multipliers = MultipliersConfig("folded", sides, multiplier_lr, multiplier_weight_decay, clip_multipliers)
    start = initial if callable(initial) else lambda role, side: initial
    resolved = resolve(placement)
    for role, chosen_sides in resolved.items():
        for side in chosen_sides:
            if not math.isfinite(start(role, side)):
                raise ValueError(f"initial of {role} {side} is {start(role, side)}: it must be finite")
    specs = _specs(model, rules, resolved)
    reached = {part.role for spec in specs.values() if covers(spec, resolved) for part in spec.parts}
    unreached = [role for role in resolved if role not in reached]
    if unreached and (not isinstance(placement, str) or not reached):
        raise ValueError(
            f"placement gives multipliers to the role {unreached[0]}, and no parameter has it: add a rule for it, or "
            "leave it out of placement"
        )
    if not reached:
        raise ValueError(f"placement is {placement!r}: it gives multipliers to no role; name one")
    for parameter, spec in specs.items():
        set_spec(parameter, spec)
    return make_optimizer(model, chosen, multipliers, start)


def _listed(sides: str | Sequence[str]) -> list[str]:
    return [sides] if isinstance(sides, str) else list(sides)


def _optimizer_config(given: OptimizerConfig | Mapping[str, Any]) -> OptimizerConfig:
    """Return the optimizer's configuration, checked as the command line would check it."""
    if isinstance(given, OptimizerConfig):
        chosen = given
    else:
        legacy.check_modern(given)
        values = _checked("optimizer", OptimizerConfig, given)
        sections = {name: values[name] for name in rule_sections() if values.get(name) is not None}
        for name, keys in sections.items():
            values[name] = _checked(f"optimizer.{name}", rule_sections()[name], keys)
        check_used(
            values.get("name", OptimizerConfig.name), [f"{n}.{key}" for n, keys in sections.items() for key in keys]
        )
        chosen = OptimizerConfig.of(values)
    for key in ("warmup_steps", "decay_steps", "min_lr"):
        if getattr(chosen, key):
            raise ValueError(
                f"optimizer.{key} is {getattr(chosen, key)}: fold makes no schedule; leave it out, and let a scheduler "
                "scale lr of the optimizer's groups"
            )
    return chosen


def _checked(section: str, dataclass: type, given: Any) -> dict[str, Any]:
    """Return the keys and values of a section, checked against the types that its dataclass states."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{section} is {given!r}: it is a section; give a mapping of its keys")
    hints, values = get_type_hints(dataclass), dict(given)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{section} has the key {key!r}: use {', '.join(hints)}")
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            raise ValueError(f"{section}.{key} is {value!r}: use one of {', '.join(get_args(hints[key]))}")
        if hints[key] in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{section}.{key} is {value!r}: give a number")
        if get_origin(hints[key]) is tuple:
            values[key] = tuple(value)
    return values


def _specs(model: torch.nn.Module, rules: Mapping[str, Rule], placement: Placement) -> dict[Parameter, ParameterSpec]:
    """Return the spec of every trainable parameter: that of a rule, one stated before, or the default of a vector."""
    names = _names(model)
    claims = _claims([name for known in names.values() for name in known], rules)
    tp_size = current_mesh().size_of("tensor")
    specs: dict[Parameter, ParameterSpec] = {}
    for parameter, known in names.items():
        stated = {name: _state(parameter, name, rules[claims[name]], tp_size) for name in known if name in claims}
        spec = next(iter(stated.values()), None)
        if spec is None and has_spec(parameter):
            spec = spec_of(parameter)
        if spec is None and parameter.requires_grad:
            spec = _unnamed(parameter, known[0], tp_size)
        if spec is None:
            continue
        if spec.side is not None:
            raise ValueError(
                f"{known[0]} is a multiplier: the model has some of its own; build it without, or train it without fold"
            )
        if covers(spec, placement) and not parameter.requires_grad:
            raise ValueError(
                f"{known[0]} is frozen, and placement gives multipliers to its role {_roles(spec)}: set its "
                "requires_grad to True, or leave the role out of placement"
            )
        _check_tie(known, stated, spec, placement)
        if parameter.requires_grad:
            specs[parameter] = spec
    return specs


def _names(model: torch.nn.Module) -> dict[Parameter, list[str]]:
    """Return all names of each parameter: several where modules share it."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for path, module in model.named_modules():
        # Megatron's head without weight is given the embedding's on each call: no parameter's name shows that.
        if getattr(module, "share_embeddings_and_output_weights", False):
            shared = module.shared_embedding_or_output_weight()
            head = f"{path}.output_layer.weight" if path else "output_layer.weight"
            if shared in names and head not in names[shared]:
                names[shared].append(head)
    return names


def _claims(names: Sequence[str], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Return the expression that finds each name, for the names that a rule finds."""
    claims: dict[str, str] = {}
    for expression in rules:
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise ValueError(f"the rule {expression!r} is no regular expression ({error}): correct it") from None
        if not found:
            raise ValueError(
                f"the rule {expression!r} matches no parameter of the model, whose names are like {names[0]}: correct "
                "or remove it"
            )
        for name in found:
            if name in claims:
                raise ValueError(
                    f"{name} is claimed by two rules, {claims[name]!r} and {expression!r}: make one of them narrower"
                )
            claims[name] = expression
    return claims


def _state(parameter: Parameter, name: str, rule: Rule, tp_size: int) -> ParameterSpec:
    """Return the spec that a rule gives to a parameter."""
    if isinstance(rule, ParameterSpec):
        return rule
    if not isinstance(rule, str):
        return rule(parameter)
    if rule not in ROLES:
        raise ValueError(f"the rule of {name} gives the role {rule!r}: use one of {', '.join(ROLES)}")
    if rule != "norm" and len(stored_shape(parameter)) != 2:
        raise ValueError(
            f"{name} has the shape {stored_shape(parameter)}, and its rule gives it the role {rule}, of a matrix: "
            "narrow the rule (end it with weight$), or give a spec"
        )
    return one_tensor(rule, parameter, tp_size)


def _unnamed(parameter: Parameter, name: str, tp_size: int) -> ParameterSpec:
    if len(stored_shape(parameter)) > 1:
        raise ValueError(
            f"{name} has the shape {stored_shape(parameter)}, and no rule names it: add a rule with its role or spec "
            "(norm: AdamW without weight decay and multipliers), or set its requires_grad to False"
        )
    return one_tensor("norm", parameter, tp_size)


def _check_tie(known: list[str], stated: dict[str, ParameterSpec], spec: ParameterSpec, placement: Placement) -> None:
    """Check that a shared parameter with multipliers has one role under all of its names."""
    roles = {name: _roles(stated[name]) if name in stated else "no rule" for name in known}
    scaled = any(covers(each, placement) for each in (spec, *stated.values()))
    if scaled and len(known) > 1 and ("no rule" in roles.values() or len(set(roles.values())) > 1):
        listed = ", ".join(f"{name} ({role})" for name, role in roles.items())
        raise ValueError(
            f"{known[0]} is shared under several names: {listed}; multipliers of one role would reach the others: "
            "untie them, leave the role out of placement, or give all names the same role"
        )


def _roles(spec: ParameterSpec) -> str:
    return ", ".join(part.role for part in spec.parts)
