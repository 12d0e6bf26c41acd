"""Rotary embedding: rotation of queries and keys by angles that depend on the position (arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamult.models.common.documents import POSITIONS


class Rotation(NamedTuple):
    """Cosines and sines of the angles, in the place of the angles that Megatron gives to each layer.

    They are computed once for all layers. It is a tuple, because DeepSpeed looks for tensors in the arguments of
    modules, and does so in tuples.
    """

    cos: Tensor
    """[batch or 1, 1, seq, dim/2]."""
    sin: Tensor
    """[batch or 1, 1, seq, dim/2]."""


def rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the rotation by `angles`, [seq, batch or 1, 1, dim] in fp32, whose second half along `dim` is equal to the
    first. Cosines and sines are rounded to `dtype`, that of the queries."""
    half = angles[..., : angles.shape[-1] // 2].permute(1, 2, 0, 3)
    return Rotation(half.cos().to(dtype), half.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the dimensions i and i + dim/2 of each head together.

    Args:
        x: [seq, batch, heads, dim] queries or keys.
        by: rotation of each position.

    Returns:
        [seq, batch, heads, dim], stored as [batch, heads, seq, dim]: attention reads it without a copy.
    """
    return _Rotate.apply(x, *by)


class _Rotate(torch.autograd.Function):
    """Function that saves cosines and sines only: the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x, [seq, batch, heads, dim], rotated, stored as [batch, heads, seq, dim]."""
    heads = x.permute(1, 2, 0, 3)
    # Compiled code depends on whether a tensor requires its gradient, so it gets none that does.
    turned = _turned_compiled(heads.detach(), cos, sin) if x.is_cuda else _turned(heads, cos, sin)
    return turned.permute(2, 0, 1, 3)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x, [batch, heads, seq, dim], rotated and contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (to_first, to_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return out


def _turned_in_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same as :func:`_turned`, in a form that torch compiles to one kernel."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).contiguous()


# One kernel for all shapes, as queries and keys, training and evaluation have different ones.
_turned_compiled = torch.compile(_turned_in_one, dynamic=True)


def once_for_all_layers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Turn the angles that Megatron gives to its TransformerBlock into a rotation. This is a forward pre-hook.

    The block's argument `rotary_pos_emb`, [seq, 1, 1, dim], has the angles of positions in the sequence. The argument
    :data:`POSITIONS` ([batch, seq]), which the block itself does not have, has positions in documents, which begin anew
    in each document; without it or with None the positions in the sequence count.
    """
    positions, angles = kwargs.pop(POSITIONS, None), kwargs["rotary_pos_emb"]
    if positions is not None:
        angles = angles[positions.transpose(0, 1), 0]  # [seq, batch, 1, dim]
    return args, {**kwargs, "rotary_pos_emb": rotation(angles, kwargs["hidden_states"].dtype)}
