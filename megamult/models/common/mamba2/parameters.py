"""Specs of the mixer's parameters. The shards are those of Megatron's MambaMixer; B and C have copies if needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from megamult.models.common.mamba2 import roles
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.parameters import megatron
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Role, Segment

_NAMES = ("z", "x", "b", "c", "dt")


def in_projection(sizes: MixerSizes, hidden: int) -> ParameterSpec:
    """Return the spec of the input projection, whose rows are [z, x, B, C, dt]. A rank holds its part of each, in this
    order."""
    return _blocks(_NAMES, roles.IN_PROJECTION, sizes.rows, (hidden,), sizes.groups, orthogonalize=True)


def convolution(sizes: MixerSizes) -> ParameterSpec:
    """Return the spec of the convolution's weight, [channels of x, B and C, 1, kernel]."""
    return _blocks(_NAMES[1:4], ["ssm_conv"] * 3, sizes.rows[1:4], (1, sizes.kernel), sizes.groups)


def convolution_bias(sizes: MixerSizes) -> ParameterSpec:
    """Return the spec of the convolution's bias, [channels of x, B and C]."""
    return _blocks(_NAMES[1:4], ["bias"] * 3, sizes.rows[1:4], (), sizes.groups)


def of_heads(role: Role, sizes: MixerSizes) -> ParameterSpec:
    """Return the spec of a vector with one number for each head, which forward passes read in fp32."""
    return megatron.vector(role, sizes.heads, 0, fp32=True)


def norm(sizes: MixerSizes) -> ParameterSpec:
    """Return the spec of the inner norm's weight, [inner]."""
    return megatron.vector("ssm_norm", sizes.inner, 0)


def quantiles(sizes: MixerSizes) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the quantile functions of the initial values of A_log and dt_bias, and of the convolution.

    They are Mamba-2's: A is uniform in [1, 16], the step size softplus(dt_bias) log-uniform in [0.001, 0.1], and
    weights and bias of the convolution are uniform in [-1, 1] / sqrt(kernel). D starts at 1. Keys are roles, but for
    the convolution's bias, whose role `bias` other tensors have too, its parameter's name.
    """
    low, high, bound = math.log(1e-3), math.log(1e-1), 1 / math.sqrt(sizes.kernel)

    def dt_bias(u: Tensor) -> Tensor:
        step = (low + (high - low) * u).exp()
        return step + (-(-step).expm1()).log()  # the inverse of softplus

    def convolution(u: Tensor) -> Tensor:
        return bound * (2 * u - 1)

    return {
        "ssm_a": lambda u: (1 + 15 * u).log(),
        "ssm_dt_bias": dt_bias,
        "ssm_conv": convolution,
        "conv_bias": convolution,
    }


def _blocks(
    names: Sequence[str],
    of: Sequence[Role],
    rows: Sequence[int],
    tail: tuple[int, ...],
    groups: int,
    orthogonalize: bool = False,
) -> ParameterSpec:
    """Return the spec of a parameter [sum of rows, *tail] that is one part after the other.

    B and C are cut into as many pieces as there are groups, at most. A rank gets only its heads' part of the gradient
    of a copy, so the optimizer step sums over copies.
    """
    starts = [sum(rows[:i]) for i in range(len(rows))]
    blocks = tuple(Block(size, groups if name in ("b", "c") else None) for name, size in zip(names, rows, strict=True))
    return ParameterSpec(
        tuple(Part(name, role, (size, *tail)) for name, role, size in zip(names, of, rows, strict=True)),
        (sum(rows), *tail),
        tuple(Segment(start, i, 0, size) for i, (start, size) in enumerate(zip(starts, rows, strict=True))),
        (Sharding("tensor", 0, blocks),),
        orthogonalize=orthogonalize,
        decay=orthogonalize,
        reduce_over=("tensor",),
    )
