"""Rules for :func:`megamult.fold`, which give specs to the parameters of a model by their names.

In megamult's own modules, each parameter has a spec. In other models, only the name tells what a parameter is. A *rule*
is a regular expression, together with the role or the spec of the parameters in whose names it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from megamult.parameters.roles import role as role_named
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Role, Segment
from megamult.parameters.stated import stored_shape


@dataclass(frozen=True)
class FromModule:
    """Function from a parameter and a module around it to the parameter's spec or role.

    The module is the parent of the one that holds the parameter: for `mamba.in_proj.weight` it is `mamba`, which knows
    the sizes of what `in_proj` stores.
    """

    spec: Callable[[Parameter, Any], ParameterSpec | Role]


@dataclass(frozen=True)
class IfPresent:
    """Rule for parameters that not every model of a class has, such as biases. It may find no parameter."""

    rule: Role | ParameterSpec | Callable[[Parameter], ParameterSpec] | FromModule


Rule = Role | ParameterSpec | Callable[[Parameter], ParameterSpec] | FromModule | IfPresent
"""What a rule gives to the parameters that its expression finds: a role, a spec, or a function from a parameter, or
from a parameter and a module around it, to its spec. A role is possible if each parameter is one matrix W[out, in].
Roles of vectors, such as `norm`, are possible for any shape; such a parameter is updated by AdamW without weight decay,
and has no multipliers. Every rule must find a parameter, unless it is wrapped in :class:`IfPresent`."""


def one_tensor(role: Role, parameter: Parameter, tp_size: int) -> ParameterSpec:
    """Return the spec of a parameter that is one logical tensor.

    Attributes that Megatron sets on the parameter tell whether and how tensor parallelism shards it.
    """
    shape = list(stored_shape(parameter)) or [1]
    shardings: tuple[Sharding, ...] = ()
    if getattr(parameter, "tensor_model_parallel", False):
        dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
        shape[dim] *= tp_size
        shardings = (Sharding("tensor", dim, (Block(shape[dim] // stride),) * stride),)
    known, rows = role_named(role), Part("", role, tuple(shape)).rows
    partial = not shardings and bool(getattr(parameter, "sequence_parallel", False))
    return ParameterSpec(
        (Part("", role, tuple(shape)),),
        tuple(shape),
        (Segment(0, 0, 0, rows),),
        shardings,
        orthogonalize=known.orthogonalized,
        decay=known.decay,
        reduce_over=("tensor",) if partial else (),
    )
