"""Tests of the gated MLP's activation."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megamult.models.common.swiglu import SwiGLU, _SwiGLU


def test_the_activation_is_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    # The same operations in the same order.
    torch.testing.assert_close(_SwiGLU.apply(x), torch.nn.functional.silu(gate) * up, rtol=0, atol=0)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x,))


def test_backward_keeps_only_the_input() -> None:
    x, kept = torch.randn(5, 3, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _SwiGLU.apply(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_another_activation_is_refused() -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.gelu,
        use_te_activation_func=True,
    )
    with pytest.raises(ValueError, match=r"activation_func is gelu, .*: this layer's activation is SwiGLU"):
        SwiGLU(config)
