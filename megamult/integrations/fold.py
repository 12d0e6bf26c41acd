"""Multipliers for any PyTorch model: :func:`fold` adds them without a change to the model's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.nn import Parameter

from megamult.distributed import environment
from megamult.distributed.mesh import current_mesh
from megamult.integrations.claims import all_names_of, claims
from megamult.integrations.rules import FromModule, IfPresent, Rule, one_tensor
from megamult.multipliers.config import MultiplierClip, MultipliersConfig
from megamult.optim import legacy
from megamult.optim.build import make_optimizer
from megamult.optim.config import OptimizerConfig, check_used, rule_sections
from megamult.optim.packed_multipliers import covers
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.initial import Initial
from megamult.parameters.roles import ROLES, TRANSFORMER, Placement, resolve
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
    clip_multipliers: MultiplierClip | bool = "out",
    multipliers: Mapping[str, Any] | None = None,
    initial: float | Callable[[Role, Side], float] = 1.0,
) -> TwoPhaseOptimizer:
    """Return an optimizer that adds learnable multipliers (arXiv 2601.04890) to a model, and trains both.

    The code of the model does not change. The model's parameters are effective weights W_eff = s diag(r) W diag(c). The
    optimizer stores W and the multipliers s, r and c (:mod:`megamult.optim.folded`). Under DeepSpeed::

        optimizer = megamult.fold({"name": "muon", "lr": 1e-3}, model, megamult.LLAMA_RULES)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        megamult.attach(engine, optimizer)

    `settings` needs ``"zero_allow_untested_optimizer": true`` and ``"gradient_clipping": 0.0``. DeepSpeed's default for
    the latter is 1.0, but the optimizer already clips by its own `clip_grad_norm`. At ZeRO 0 in bf16, call
    ``deepspeed.initialize`` within ``with optimizer.paused():``. It calls ``optimizer.step()`` there, which without
    ``paused()`` would decay the weights and count as Adam's first step.

    In a loop without DeepSpeed, average gradients over data-parallel ranks and call ``optimizer.step()``. If `initial`
    is not 1, call ``optimizer.begin()`` before the first forward pass: it sets the model's parameters to W_eff.

    A vector to which no rule applies, such as the weight of a norm or a bias, gets the role `norm`: AdamW updates it
    without weight decay. A parameter that already has a spec, such as a parameter of megamult's own modules, needs no
    rule. A frozen parameter, whose `requires_grad` is False, gets no multipliers and no update, whatever its role.

    Args:
        optimizer: keys of the section `optimizer` of a run, such as ``{"name": "muon", "muon": {"momentum": 0.9}}``,
            without the keys of the schedule. A scheduler of DeepSpeed or torch that scales `lr` of the optimizer's
            groups also scales the learning rate of the multipliers.
        model: the complete model, which may be built under `deepspeed.zero.Init`. A Megatron model needs Megatron's
            process groups.
        rules: mapping from a regular expression to a role, a spec, or a function from a parameter to its spec
            (:data:`megamult.integrations.rules.Rule`). A rule applies to the parameters in whose names the expression
            is found. :data:`megamult.LLAMA_RULES`, :data:`~megamult.MISTRAL_RULES`, :data:`~megamult.QWEN2_RULES`,
            :data:`~megamult.QWEN3_RULES`, :data:`~megamult.FALCON_H1_RULES` and :func:`megamult.megatron_rules` are
            such mappings.
        placement: `all`, `symmetry_free`, `scalar`, or a mapping from role to `row`, `col` or `scalar`, or to a list of
            these.
        multiplier_lr: peak learning rate of multipliers, or None to use that of the optimizer.
        multiplier_weight_decay: decoupled weight decay of multipliers.
        clip_multipliers: how the gradient of all multipliers is clipped at the optimizer's threshold: `out` (not
            clipped), `own` (by its own norm) or `joint` (by one norm of all gradients, those of weights included).
            False means `out`, and True means `own`.
        multipliers: further keys of the section `multipliers` of a run: `lr_factors`, `weight_decay_factors` and
            `parametrization`.
        initial: initial value of all multipliers, or a function from (role, side) to the initial value. The model's
            present weights become W, so an initial value other than 1 rescales the effective weights.

    Returns:
        The optimizer: AdamW for all parameters, or another update rule for matrices and AdamW for the rest. Its
        attribute `folded` has the multipliers. Its attribute `ownership` says how many tensors and elements each rule
        trains, which rank 0 also prints in one line.

    Raises:
        ValueError: a key or value is unknown; a rule finds no parameter; two rules find the same parameter; the model
            has a trainable matrix with neither rule nor spec; a parameter that is shared by several roles would get
            multipliers; a placement that is a mapping names a role that no trainable parameter has; no parameter would
            get multipliers; or Muon would train no matrix.
    """
    chosen = _optimizer_config(optimizer)
    further = dict(multipliers or {})
    unknown = [key for key in further if key not in _FURTHER]
    if unknown:
        raise ValueError(f"multipliers has the keys {', '.join(unknown)}: use only {', '.join(_FURTHER)}")
    settings = MultipliersConfig(
        "folded",
        placement,  # type: ignore[arg-type]  # sides in any sequence
        lr=multiplier_lr,
        weight_decay=multiplier_weight_decay,
        clip=clip_multipliers,
        **further,
    )
    start = initial if callable(initial) else lambda role, side: initial
    resolved = resolve(placement, ROLES)
    for role, chosen_sides in resolved.items():
        for side in chosen_sides:
            value, positive = start(role, side), settings.parametrization != "direct"
            if not math.isfinite(value) or (positive and value <= 0):
                needed = f"positive with parametrization {settings.parametrization}" if positive else "finite"
                raise ValueError(f"initial gives {role} (side {side}) the value {value}: it must be {needed}")
    everything = _specs(model, rules, resolved)
    specs = {parameter: spec for parameter, spec in everything.items() if parameter.requires_grad}
    reached = {part.role for spec in specs.values() if covers(spec, resolved) for part in spec.parts}
    known = {part.role for spec in everything.values() for part in spec.parts}
    # A name stands for the roles of all architectures: those that only others have are no fact about this model.
    asked = [role for role in resolved if role in known or role in TRANSFORMER or not isinstance(placement, str)]
    unreached = [role for role in asked if role not in reached]
    if unreached and (not isinstance(placement, str) or not reached):
        raise ValueError("; ".join(_without_parameter(unreached, known, isinstance(placement, str))))
    if not reached:
        raise ValueError(
            f"placement is {placement!r}, which gives multipliers to no role: give them to at least one role"
        )
    present = {part.role for spec in specs.values() for part in spec.parts}
    placed = {role: sides for role, sides in resolved.items() if role in present}
    if mistakes := [*chosen.role_mistakes(present), *settings.by_side_mistakes(placed)]:
        raise ValueError("; ".join(mistakes))
    for parameter, spec in specs.items():
        set_spec(parameter, spec)
    made = make_optimizer(model, chosen, settings, Initial(start))
    if environment.rank() == 0:
        print(f"megamult: {made.ownership}", flush=True)
    return made


_FURTHER = ("lr_factors", "weight_decay_factors", "parametrization")
"""Keys of the section `multipliers` that :func:`fold` accepts in its argument `multipliers`."""


def _without_parameter(roles: Sequence[Role], known: set[Role], named: bool) -> Iterator[str]:
    """Yield messages about roles of a placement that no trainable parameter has.

    A placement with a name may have roles that a model lacks. If its other roles are all frozen, only these are told.

    Args:
        roles: the roles.
        known: roles of all parameters, frozen ones included.
        named: whether the placement is a name and not a mapping.
    """
    frozen = [role for role in roles if role in known]
    absent = [role for role in roles if role not in known] if not (frozen and named) else []
    leave_out = "give a mapping from role to sides as placement" if named else "leave {} out of placement"
    for found, state, remedy in (
        (absent, "no parameter has this role", "add a rule for it"),
        (frozen, "all parameters of this role are frozen", "set requires_grad to True"),
    ):
        if found:
            text = f"placement gives multipliers to {', '.join(found)}, and {state}: {remedy}, or {leave_out}"
            if len(found) > 1:
                text = text.replace("this role", "these roles").replace("a rule for it", "rules for them")
            yield text.format("it" if len(found) == 1 else "them")


def _optimizer_config(given: OptimizerConfig | Mapping[str, Any]) -> OptimizerConfig:
    """Return the optimizer's configuration.

    Raises:
        ValueError: a key is unknown, of an earlier version, of the schedule, or not used by this optimizer; or a value
            has the wrong type or is not among the allowed ones.
    """
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
    """Return the keys and values of a section, checked. Values of tuple fields are converted to tuples.

    Raises:
        ValueError: a key is not a field of the dataclass, or a value does not have the field's type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{section} is {given!r}: give a mapping of the section's keys")
    types = get_type_hints(dataclass)  # of class variables too, which are no keys
    hints, values = {key.name: types[key.name] for key in fields(dataclass)}, dict(given)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{section} has no key {key!r}: use one of {', '.join(hints)}")
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            raise ValueError(f"{section}.{key} is {value!r}: use one of {', '.join(get_args(hints[key]))}")
        if hints[key] in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{section}.{key} is {value!r}: give a number")
        if get_origin(hints[key]) is tuple:
            values[key] = tuple(value)
    return values


def _specs(model: torch.nn.Module, rules: Mapping[str, Rule], placement: Placement) -> dict[Parameter, ParameterSpec]:
    """Return the spec of every trainable parameter, and of the frozen ones that have one.

    A spec comes from the rule that finds the parameter. If no rule does, it is the spec that the parameter already has,
    or for a vector without one, a spec of the role `norm`.

    Raises:
        ValueError: see :func:`fold`.
    """
    names = all_names_of(model)
    claimed_by = claims([name for known in names.values() for name in known], rules)
    tp_size = current_mesh().size_of("tensor")
    specs: dict[Parameter, ParameterSpec] = {}
    for parameter, known in names.items():
        claimed = [name for name in known if name in claimed_by]
        stated = {name: _state(parameter, name, rules[claimed_by[name]], tp_size, model) for name in claimed}
        spec = next(iter(stated.values()), None)
        if spec is None and has_spec(parameter):
            spec = spec_of(parameter)
        if spec is None and parameter.requires_grad:
            spec = _unnamed(parameter, known[0], tp_size)
        if spec is None:
            continue
        if spec.side is not None:
            raise ValueError(
                f"{known[0]} is a multiplier: fold needs a model without multipliers; build one, or train "
                "this one without fold"
            )
        if parameter.requires_grad:
            _check_tie(known, stated, spec, placement)
        specs[parameter] = spec
    return specs


def _state(parameter: Parameter, name: str, rule: Rule, tp_size: int, model: torch.nn.Module) -> ParameterSpec:
    """Return the spec that a rule gives to a parameter.

    Raises:
        ValueError: the rule has an unknown role, or a matrix's role for a parameter that is no matrix.
    """
    if isinstance(rule, IfPresent):
        rule = rule.rule
    if isinstance(rule, FromModule):
        rule = rule.spec(parameter, model.get_submodule(".".join(name.split(".")[:-2])))
    if isinstance(rule, ParameterSpec):
        return rule
    if not isinstance(rule, str):
        return rule(parameter)
    if rule not in ROLES:
        raise ValueError(f"the rule of {name} gives the role {rule!r}: use one of {', '.join(ROLES)}")
    if ROLES[rule].decay and len(stored_shape(parameter)) != 2:
        raise ValueError(
            f"{name} has the shape {stored_shape(parameter)}, and its rule gives it the role {rule}, which only "
            "a matrix can have: narrow the rule (end it with weight$), or give a spec"
        )
    return one_tensor(rule, parameter, tp_size)


def _unnamed(parameter: Parameter, name: str, tp_size: int) -> ParameterSpec:
    if len(stored_shape(parameter)) > 1:
        raise ValueError(
            f"{name} has the shape {stored_shape(parameter)}, and no rule names it: add a rule with its role or spec "
            "(the role norm means AdamW with neither weight decay nor multipliers), or set its requires_grad to False"
        )
    return one_tensor("norm", parameter, tp_size)


def _check_tie(known: list[str], stated: dict[str, ParameterSpec], spec: ParameterSpec, placement: Placement) -> None:
    """Check that a shared parameter with multipliers has the same role under all of its names.

    Args:
        known: all names of the parameter.
        stated: spec from a rule, by name; names that no rule finds are left out.
        spec: the spec that the parameter will have.
        placement: placement of multipliers.

    Raises:
        ValueError: the parameter has multipliers, and two of its names have different roles, or one has no rule.
    """
    roles = {name: _roles(stated[name]) if name in stated else "no rule" for name in known}
    scaled = any(covers(each, placement) for each in (spec, *stated.values()))
    if scaled and len(known) > 1 and ("no rule" in roles.values() or len(set(roles.values())) > 1):
        listed = ", ".join(f"{name} ({role})" for name, role in roles.items())
        raise ValueError(
            f"{known[0]} is shared under several names: {listed}; multipliers for one name would scale it under the "
            "others too: untie it, leave its roles out of placement, or give all names the same role"
        )


def _roles(spec: ParameterSpec) -> str:
    return ", ".join(part.role for part in spec.parts)
