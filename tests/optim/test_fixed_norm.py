"""Matrices of fixed norm against a float64 reference, for AdamW and Muon, with and without folded multipliers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.distributed.mesh import ALONE
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.build import make_optimizer
from megamult.optim.config import AdamWConfig, MuonConfig, OptimizerConfig
from megamult.optim.muon.coefficients import coefficients as coefficient_set
from megamult.optim.muon.newton_schulz import scale as scale_factor
from megamult.parameters import megatron
from megamult.parameters.stated import set_spec

LR = 0.05
SPEC = megatron.fused_qkv(4, 2, 2, 6)
ROWS = {
    part.name: torch.cat([torch.arange(s.start, s.start + s.length) for s in SPEC.segments if s.part == p])
    for p, part in enumerate(SPEC.parts)
}


class Attention(torch.nn.Module):
    """Q, K and V in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(1)))
        set_spec(self.weight, SPEC)


def gradient(step: int) -> Tensor:
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(100 + step))


def optimizer_of(name: str, model: torch.nn.Module, **multipliers: Any) -> Any:
    chosen = OptimizerConfig(
        name=name,  # type: ignore[arg-type]
        lr=LR,
        weight_decay=0.5,  # has no effect on matrices of fixed norm
        clip_grad_norm=0.0,
        adamw=AdamWConfig(eps=1e-3),
        muon=MuonConfig(nesterov=False) if name == "muon" else None,
    )
    return make_optimizer(model, chosen, MultipliersConfig(norm="fixed", **multipliers), mesh=ALONE)


def reference(name: str, steps: int) -> Tensor:
    """W after so many steps in float64: each matrix updated and scaled back to its first norm by itself."""
    values = Attention().weight.detach().double()
    first = {part: values[rows].norm() for part, rows in ROWS.items()}
    mean, square = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, steps + 1):
        g = gradient(step).double()
        if name == "adamw":
            mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
            update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-3)
        else:
            mean = 0.95 * mean + 0.05 * g
            update = torch.empty_like(mean)
            for rows in ROWS.values():
                x = mean[rows] / mean[rows].norm()
                for a, b, c in coefficient_set("simple", 5):
                    gram = x @ x.T
                    x = a * x + (b * gram + c * gram @ gram) @ x
                update[rows] = x * scale_factor(*x.shape, "match_rms_adamw")
        values = values - LR * update
        for part, rows in ROWS.items():
            values[rows] *= first[part] / values[rows].norm()
    return values


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_step_is_an_update_and_a_projection_of_each_matrix(name: str) -> None:
    model = Attention()
    optimizer = optimizer_of(name, model, implementation="none")
    for step in range(1, 5):
        model.weight.grad = gradient(step)
        optimizer.step()
    # Four updates in fp32; Newton-Schulz multiplies roundings of small singular values by up to 3.4^5.
    tolerance = 2e-6 if name == "adamw" else 2e-4
    torch.testing.assert_close(model.weight.detach().double(), reference(name, 4), rtol=0, atol=tolerance)


def test_folded_multipliers_are_gains_of_a_matrix_of_fixed_norm() -> None:
    model = Attention()
    optimizer = optimizer_of("adamw", model, implementation="folded", placement={"q": "row", "v": ["row", "col"]})
    for step in range(1, 5):
        model.weight.grad = gradient(step)
        optimizer.step()
    (piece,) = optimizer._bound.slices
    latent = optimizer.weight(piece).view(SPEC.shape).double()
    first = Attention().weight.detach().double()
    for rows in ROWS.values():
        assert float(latent[rows].norm()) == pytest.approx(float(first[rows].norm()), rel=1e-6)
    gains = {(v.role, v.side): optimizer.folded.values[v.entries].double() for v in optimizer.folded.vectors}
    assert all((gain - 1).abs().max() > LR for gain in gains.values())
    effective = latent.clone()
    effective[ROWS["q"]] *= gains["q", "row"].unsqueeze(1)
    effective[ROWS["v"]] *= gains["v", "row"].unsqueeze(1) * gains["v", "col"]
    torch.testing.assert_close(model.weight.detach().double(), effective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_dict_brings_the_norms_back(name: str) -> None:
    model, other = Attention(), Attention()
    optimizer, loaded = (optimizer_of(name, each, implementation="none") for each in (model, other))
    for step in (1, 2):
        model.weight.grad = gradient(step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        other.weight.copy_(model.weight)
    loaded.load_state_dict(saved)
    for each, its in ((optimizer, model), (loaded, other)):
        its.weight.grad = gradient(3)
        each.step()
    assert torch.equal(other.weight, model.weight)


def test_the_state_of_an_optimizer_without_fixed_norms_keeps_the_norms_of_its_weights() -> None:
    free, model = Attention(), Attention()
    chosen = OptimizerConfig(lr=LR, weight_decay=0.5, clip_grad_norm=0.0)
    before = make_optimizer(free, chosen, MultipliersConfig("folded", {"q": "row"}), mesh=ALONE)
    free.weight.grad = gradient(1)
    before.step()
    (piece,) = before._bound.slices  # type: ignore[union-attr]
    latent = before.weight(piece).clone().view(SPEC.shape)
    optimizer = optimizer_of("adamw", model, implementation="folded", placement={"q": "row"})
    optimizer.load_state_dict(before.state_dict())
    model.weight.grad = gradient(2)
    optimizer.step()
    (piece,) = optimizer._bound.slices
    after = optimizer.weight(piece).view(SPEC.shape)
    for rows in ROWS.values():
        assert float(after[rows].norm()) == pytest.approx(float(latent[rows].norm()), rel=1e-6)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_a_matrix_of_zeros_is_refused() -> None:
    model = Attention()
    with torch.no_grad():
        model.weight[ROWS["v"]] = 0
    with pytest.raises(ValueError, match=r"1 matrices are 0, the first is v\.weight, .*: they would stay 0; init"):
        optimizer_of("adamw", model, implementation="none").begin()
