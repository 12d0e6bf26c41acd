"""Multipliers that are functions of trained variables, against torch's AdamW on these variables in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.distributed.mesh import ALONE
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.parametrization import PARAMETRIZATIONS, relative_step
from megamult.multipliers.specs import multiplier
from megamult.optim.build import make_optimizer
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.parameters import megatron
from megamult.parameters.initial import Initial
from megamult.parameters.stated import set_spec

ROWS, COLS, LR, DECAY = 6, 4, 0.1, 0.5
SPEC = megatron.fused_qkv(4, 2, 2, ROWS)  # Q [8, 6], K [4, 6], V [4, 6]
PLACEMENT = {"q": ["row"], "k": ["row"], "v": ["row"]}
NAMES = ("log", "softplus")
FUNCTIONS = {"log": torch.exp, "softplus": lambda u: torch.log1p(torch.exp(u))}
STEPS = 6


def weight() -> Tensor:
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(1))


def gradient(step: int) -> Tensor:
    """dL/dW_eff of a step."""
    return torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(100 + step))


class Layered(torch.nn.Module):
    """A weight, and a multiplier of each of its rows as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight())
        self.row_multiplier = torch.nn.Parameter(torch.ones(SPEC.shape[0]))
        set_spec(self.weight, SPEC)
        set_spec(self.row_multiplier, multiplier("row", SPEC, (0, 1, 2), partial=False))


class Folded(torch.nn.Module):
    """A weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight())
        set_spec(self.weight, SPEC)


def optimizer_of(model: torch.nn.Module, implementation: str, name: str, **more: Any) -> Any:
    settings = MultipliersConfig(
        implementation,  # type: ignore[arg-type]
        PLACEMENT,
        weight_decay=DECAY,
        clip="own",
        parametrization=name,  # type: ignore[arg-type]
        **more,
    )
    chosen = OptimizerConfig(lr=LR, weight_decay=0.25, clip_grad_norm=1.0, adamw=AdamWConfig(eps=1e-3))
    return make_optimizer(model, chosen, settings, mesh=ALONE)


def reference(name: str) -> tuple[Tensor, Tensor, list[float]]:
    """W_eff and the multipliers after all steps, and the norm of the variables' gradient at each, in float64."""
    w = weight().double().requires_grad_()
    start = PARAMETRIZATIONS[name].variable(torch.ones(SPEC.shape[0], dtype=torch.float64))  # type: ignore
    u = start.clone().requires_grad_()
    rule = torch.optim.AdamW(
        [{"params": [w], "weight_decay": 0.25}, {"params": [u], "weight_decay": DECAY}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-3,
    )
    norms = []
    for step in range(STEPS):
        rule.zero_grad()
        (gradient(step).double() * FUNCTIONS[name](u)[:, None] * w).sum().backward()
        assert w.grad is not None and u.grad is not None
        norms.append(float(u.grad.norm()))
        for each in (w, u):
            each.grad *= min(1.0, 1.0 / (float(each.grad.norm()) + 1e-6))
        rule.step()
    r = FUNCTIONS[name](u.detach())
    return r[:, None] * w.detach(), r, norms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["layer", "folded"])
def test_an_update_is_adamws_on_the_variable(implementation: str, name: str) -> None:
    effective, multipliers, norms = reference(name)
    model = Layered() if implementation == "layer" else Folded()
    optimizer = optimizer_of(model, implementation, name)
    for step in range(STEPS):
        model.weight.grad = gradient(step)
        if isinstance(model, Layered):
            r, w = model.row_multiplier.detach(), model.weight.detach()
            model.row_multiplier.grad = (w * gradient(step)).sum(1)
            model.weight.grad = r[:, None] * gradient(step)
        optimizer.step()
        # Sums of 6 products in fp32, and the roundings of the steps before.
        assert optimizer.norms.multipliers == pytest.approx(norms[step], rel=1e-5)
    found = model.weight.detach()
    if isinstance(model, Layered):
        found = model.row_multiplier.detach()[:, None] * found
        torch.testing.assert_close(model.row_multiplier.detach().double(), multipliers, rtol=1e-5, atol=0)
    # The updates move multipliers by 0.1 to 0.5. Six steps in fp32 leave a few times 2^-24 of each term.
    torch.testing.assert_close(found.double(), effective, rtol=1e-5, atol=1e-6)
    assert float((multipliers - 1).abs().max()) > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_is_that_of_the_function_and_the_variable_its_inverse(name: str) -> None:
    chosen = PARAMETRIZATIONS[name]  # type: ignore[index]
    u = torch.linspace(-20, 30, 401, dtype=torch.float64, requires_grad=True)
    r = FUNCTIONS[name](u)
    (slope,) = torch.autograd.grad(r.sum(), u)
    torch.testing.assert_close(chosen.value(u.detach()), r.detach(), rtol=1e-12, atol=0)
    # From u = -20 on, r is 2e-9 and e^-r is 1 - 2e-9: differences keep 7 digits of 16, if written without care.
    torch.testing.assert_close(chosen.slope(r.detach()), slope, rtol=1e-8, atol=0)
    torch.testing.assert_close(chosen.variable(r.detach()), u.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_update_does_not_change_keeps_its_last_bit(name: str) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(3)) * 5 + 0.01
    values[-3:] = 0  # padding
    before = values.clone()
    with PARAMETRIZATIONS[name].variables([values]):  # type: ignore[index,union-attr]
        assert torch.isfinite(values).all() and not torch.equal(values, before)
        values[:10] += 0.5
    assert torch.equal(values[10:], before[10:]) and bool((values[:10] > before[:10]).all())


@pytest.mark.parametrize("implementation", ["layer", "folded"])
def test_a_loaded_multiplier_that_is_not_positive_is_refused(implementation: str) -> None:
    model = Layered() if implementation == "layer" else Folded()
    plain, optimizer = (optimizer_of(model, implementation, name) for name in ("direct", "log"))
    for each in (plain, optimizer):
        each.begin()
    if isinstance(model, Layered):  # whose multipliers are the model's, and come with its own state dict
        with torch.no_grad():
            model.row_multiplier[2] = -0.5
    else:
        plain.folded.values[2] = -0.5
    saved = plain.state_dict()
    with pytest.raises(ValueError, match=r"1 multipliers are not positive, and multipliers\.parametrization log"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("implementation", ["layer", "folded"])
def test_a_multiplier_that_is_not_positive_from_the_start_is_refused(implementation: str) -> None:
    """In a loop of one's own, where no checkpoint of the optimizer is loaded."""
    model = Layered() if implementation == "layer" else Folded()
    if isinstance(model, Layered):
        with torch.no_grad():
            model.row_multiplier[2] = -0.5
        optimizer = optimizer_of(model, implementation, "log")
    else:
        optimizer = make_optimizer(
            model,
            OptimizerConfig(lr=LR),
            MultipliersConfig("folded", PLACEMENT, parametrization="log"),
            Initial(lambda role, side: -0.5 if role == "q" else 1.0),
            mesh=ALONE,
        )
    with pytest.raises(ValueError, match=r"multipliers are not positive"):
        optimizer.begin()


@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_raises_leaves_multipliers_and_not_their_variables(name: str) -> None:
    values = torch.tensor([2.0, 0.5, 1.0])
    before = values.clone()
    with pytest.raises(MemoryError), PARAMETRIZATIONS[name].variables([values]):  # type: ignore[index,union-attr]
        raise MemoryError
    assert torch.equal(values, before)


def test_the_relative_step_is_that_of_a_small_change_of_the_variable() -> None:
    for name, r in (("direct", 0.25), ("log", 0.25), ("softplus", 0.25), ("softplus", 4.0)):
        chosen = PARAMETRIZATIONS[name]  # type: ignore[index]
        value = torch.tensor(r, dtype=torch.float64)
        moved = r + 1e-6 if chosen is None else float(chosen.value(chosen.variable(value) + 1e-6))
        assert relative_step(name, r) == pytest.approx((moved / r - 1) / 1e-6, rel=1e-5)  # type: ignore[arg-type]
