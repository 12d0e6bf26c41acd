"""Gated MLP whose activation, SwiGLU (arXiv 2002.05202), is one autograd function on devices where Megatron fuses
nothing."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class GatedMLP(MLP):
    """Megatron's MLP with SwiGLU. Where Megatron's configuration fuses the activation, Megatron computes it."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """Run Megatron's MLP; arguments and results are the same."""
        config = self.config
        plain = (
            config.activation_func is torch.nn.functional.silu
            and not (config.bias_activation_fusion or config.use_te_activation_func)
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
        )
        if not plain or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale=per_token_scale, **kwargs)
        both, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(both if bias is None else both + bias))


class _SwiGLU(torch.autograd.Function):
    """Function silu(gate) * up of x = [gate, up], [..., 2 ffn], that saves x only.

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
