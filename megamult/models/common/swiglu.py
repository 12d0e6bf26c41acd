"""SwiGLU (arXiv 2002.05202), the activation of a gated MLP, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class SwiGLU(torch.nn.Module):
    """silu(gate) * up of x = [gate, up]. x: [..., 2 ffn]; result: [..., ffn].

    It is the module that Megatron's MLP calls if `use_te_activation_func` is True in the configuration. On CUDA
    `bias_activation_fusion` is set instead, and Megatron's own fused SwiGLU runs.

    Raises:
        ValueError: the configuration asks for another activation.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        limits = config.activation_func_clamp_value, config.glu_linear_offset
        if config.activation_func is not torch.nn.functional.silu or any(limits):
            raise ValueError(
                f"use_te_activation_func is True, activation_func is {config.activation_func.__name__}, and "
                f"activation_func_clamp_value and glu_linear_offset are {limits}: this layer's activation is SwiGLU "
                "without limits; set use_te_activation_func to False"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Function that saves x only.

    Backward computes silu(gate) again and writes both gradients where they are returned, so that they are not joined
    by another pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        of_gate, of_up = out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(grad)
        torch.mul(grad, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return out
