"""Effective weights stand in the place of weights in any layer that reads `weight`, and are not kept."""

from __future__ import annotations

import pytest
import torch

from megamult.multipliers.layer_scaling import LayerScaling
from megamult.multipliers.wrapped import effective_weight
from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard

ROWS, COLS = 6, 5
SPEC = megatron.single_matrix("up", ROWS, COLS, None)


def scaled(layer: torch.nn.Linear, row: torch.Tensor, col: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scaling = LayerScaling(SPEC, {"up": frozenset({"row", "col"})}, tensor_shard(0, 1))
    with effective_weight(layer, layer.weight, (row, col, None), scaling):
        output: torch.Tensor = layer(x)
    return output


def test_a_plain_linear_layer_computes_with_the_effective_weight_and_gets_the_gradients_of_equation_4() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(COLS, ROWS, dtype=torch.float64)
    row, col = (torch.rand(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (ROWS, COLS))
    x, grad = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (COLS, ROWS))
    output = scaled(layer, row, col, x)
    w = layer.weight.detach()
    assert torch.allclose(output, x @ (row[:, None] * w * col).T + layer.bias, rtol=1e-14)
    output.backward(grad)
    g = grad.T @ x
    assert torch.allclose(layer.weight.grad, row[:, None] * g * col, rtol=1e-12)
    # Sums of these two are taken in fp32 (scale_backward's docstring).
    assert torch.allclose(row.grad, (w * g * col).sum(1), rtol=1e-5)
    assert torch.allclose(col.grad, (w * g * row[:, None]).sum(0), rtol=1e-5)


def test_the_parameter_is_registered_and_found_as_before() -> None:
    layer = torch.nn.Linear(COLS, ROWS)
    weight = layer.weight
    scaled(layer, torch.full((ROWS,), 2.0), torch.ones(COLS), torch.ones(1, COLS))
    assert layer.weight is weight and dict(layer.named_parameters())["weight"] is weight
    assert "weight" not in vars(layer)


def test_what_the_layer_saves_of_the_effective_weight_is_made_again_for_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []
    scale = LayerScaling.scale

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        made.append(scale(*arguments))
        return made[-1]

    monkeypatch.setattr(LayerScaling, "scale", counted)
    layer = torch.nn.Linear(COLS, ROWS, bias=False)
    row, col = torch.full((ROWS,), 2.0, requires_grad=True), torch.ones(COLS, requires_grad=True)
    x = torch.ones(1, COLS, requires_grad=True)
    output = scaled(layer, row, col, x)
    assert len(made) == 1
    output.sum().backward()
    assert len(made) == 2, "the gradient of the input needs the effective weight"
    assert torch.allclose(x.grad, 2 * layer.weight.sum(0))
