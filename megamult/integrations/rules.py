"""What the parameters of other people's models are, by name: rules for :func:`megamult.fold`.

megamult's own modules state the spec of each parameter. Elsewhere only a name says what a parameter is, and a *rule*
says what a name means: a regular expression, and the role or the spec of what it finds.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import Parameter

from megamult.parameters.roles import role as role_named
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Role, Segment
from megamult.parameters.stated import stored_shape

Rule = Role | ParameterSpec | Callable[[Parameter], ParameterSpec]
"""What the parameters that an expression finds are: a role, where each is one matrix W[out, in] (or, as `norm`,
whatever AdamW trains without weight decay and without multipliers); or a spec, or a function that makes one."""


def one_tensor(role: Role, parameter: Parameter, tp_size: int) -> ParameterSpec:
    """Return the spec of a parameter that is one logical tensor; Megatron's attributes say whether and how tensor
    parallelism shards it."""
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
