"""Rules for :func:`megamult.fold`, which say by name what the parameters of other people's models are.

megamult's own modules state the spec of each parameter. In other models only the name tells what a parameter is. A
*rule* interprets names: it has a regular expression, and the role or the spec of the parameters that this finds.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import Parameter

from megamult.parameters.roles import role as role_named
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Role, Segment
from megamult.parameters.stated import stored_shape

Rule = Role | ParameterSpec | Callable[[Parameter], ParameterSpec]
"""Meaning of the parameters that an expression finds: a role, if each is one matrix W[out, in] (the role `norm` fits
any shape: AdamW without weight decay, no multipliers); or a spec; or a function that makes one."""


def one_tensor(role: Role, parameter: Parameter, tp_size: int) -> ParameterSpec:
    """Return the spec of a parameter that is one logical tensor.

    Megatron's attributes on the parameter say whether and how tensor parallelism shards it.
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
