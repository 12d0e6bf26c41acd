"""Learning rates and decays of single roles against a float64 reference that updates each logical matrix by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult import param_groups
from megamult.distributed.mesh import ALONE
from megamult.multipliers import specs
from megamult.optim.adamw import AdamW
from megamult.optim.build import make_optimizer
from megamult.optim.clip import Clipping, Norms
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.optim.param_groups import set_lr_factor
from megamult.optim.rates import Rate, Rates
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters import megatron
from megamult.parameters.stated import named_specs, set_spec

LR, DECAY = 0.02, 0.3
WEIGHTS = {"q": Rate(0.5, 1.0), "v": Rate(2.0, 0.0), "embedding": Rate(1.0, 3.0), "norm": Rate(4.0), "k": Rate(0.0)}
MULTIPLIERS: dict[tuple[str, Any], Rate] = {
    ("q", "row"): Rate(3.0, 0.5),
    ("v", "col"): Rate(0.0),
    ("k", "col"): Rate(0.1),
}


class Model(torch.nn.Module):
    """Q, K and V in one parameter, with their multipliers; an embedding with padding; a norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        qkv = megatron.fused_qkv(4, 2, 2, 6)  # heads, groups, size of a head, columns
        for name, stated in {
            "qkv": qkv,
            "row_multiplier": specs.row_multiplier(qkv, [0, 1, 2], False),
            "col_multiplier": specs.col_multiplier(qkv, [0, 1, 2], False),
            "embedding": megatron.vocabulary("embedding", 7, 8, 6),
            "norm": megatron.norm(6, False),
        }.items():
            parameter = torch.nn.Parameter(torch.randn(stated.shape, generator=generator))
            set_spec(parameter, stated)
            self.register_parameter(name, parameter)


def parts(model: torch.nn.Module) -> Iterator[tuple[str, str | None, torch.nn.Parameter, Tensor]]:
    """(role, side, parameter, rows of the parameter) of each logical tensor."""
    for _, parameter, spec in named_specs(model):
        for p, part in enumerate(spec.parts):
            rows = [torch.arange(s.start, s.start + s.length) for s in spec.segments if s.part == p]
            yield part.role, spec.side, parameter, torch.cat(rows)


def give_gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.embedding.grad[7:] = 0  # type: ignore[union-attr, index]


def reference(model: torch.nn.Module, steps: int) -> list[Tensor]:
    """Every parameter after so many steps of AdamW in float64, each logical tensor at its own rate."""
    values = {p: p.detach().double().clone() for p in model.parameters()}
    moments = {p: (torch.zeros_like(v), torch.zeros_like(v)) for p, v in values.items()}
    for step in range(1, steps + 1):
        give_gradients(model, step)
        for role, side, parameter, rows in parts(model):
            factor = WEIGHTS.get(role, Rate()) if side is None else MULTIPLIERS.get((role, side), Rate())  # type: ignore[arg-type]
            group_decay = {"norm": 0.0}.get(role, DECAY if side is None else 0.1)
            lr, decay = LR * factor.lr, group_decay * factor.weight_decay
            if lr == 0:
                continue
            assert parameter.grad is not None
            gradient, (first, second) = parameter.grad.double()[rows], moments[parameter]
            first[rows] = 0.9 * first[rows] + 0.1 * gradient
            second[rows] = 0.95 * second[rows] + 0.05 * gradient**2
            unbiased = first[rows] / (1 - 0.9**step), second[rows] / (1 - 0.95**step)
            values[parameter][rows] *= 1 - lr * decay
            values[parameter][rows] -= lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return list(values.values())


def test_each_logical_tensor_is_updated_at_its_own_rate() -> None:
    model, expected = Model(), reference(Model(), 5)
    groups = param_groups(model, lr=LR, weight_decay=DECAY, multiplier_weight_decay=0.1)
    rates = Rates(WEIGHTS, MULTIPLIERS)
    optimizer = TwoPhaseOptimizer(groups, AdamW(), clip_grad_norm=0.0, model=model, rates=rates, mesh=ALONE)
    for step in range(1, 6):
        give_gradients(model, step)
        optimizer.step()
    for (name, parameter), value in zip(model.named_parameters(), expected, strict=True):
        if name == "embedding":
            parameter, value = parameter[:7], value[:7]
        # Five updates in fp32, each with a few roundings of 2^-24 of values of about 1.
        torch.testing.assert_close(parameter.detach().double(), value, rtol=2e-6, atol=2e-6)
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {5.0}


def test_constants_are_in_no_norm() -> None:
    model = Model()
    groups = param_groups(model, lr=LR, weight_decay=DECAY)
    optimizer = TwoPhaseOptimizer(groups, AdamW(), model=model, rates=Rates(WEIGHTS, MULTIPLIERS), mesh=ALONE)
    give_gradients(model, 1)
    squares = {"main": 0.0, "multipliers": 0.0}
    for role, side, parameter, rows in parts(model):
        constant = (WEIGHTS.get(role, Rate()) if side is None else MULTIPLIERS.get((role, side), Rate())).lr == 0  # type: ignore[arg-type]
        if not constant:
            assert parameter.grad is not None
            squares["main" if side is None else "multipliers"] += float(parameter.grad.double()[rows].square().sum())
    optimizer.step()
    assert optimizer.norms is not None
    assert optimizer.norms.main == pytest.approx(squares["main"] ** 0.5, rel=1e-6)
    assert optimizer.norms.multipliers == pytest.approx(squares["multipliers"] ** 0.5, rel=1e-6)


def test_joint_clipping_has_one_norm_and_one_factor() -> None:
    norms = Norms(3.0, 4.0)
    assert Clipping(1.0, "joint").factors(norms) == pytest.approx((0.2, 0.2), rel=1e-6)
    assert Clipping(1.0, "own").factors(norms) == pytest.approx((1 / 3, 1 / 4), rel=1e-6)
    assert Clipping(1.0, "out").factors(norms) == pytest.approx((1 / 3, 1.0), rel=1e-6)
    assert Clipping(0.0, "joint").factors(norms) == (1.0, 1.0)
    assert [Clipping(1.0, clip, skip_above=4.5).skips(norms) for clip in ("out", "own", "joint")] == [
        False,
        False,
        True,
    ]  # type: ignore[arg-type]


def test_a_schedule_leaves_constant_groups_at_their_peak() -> None:
    groups = param_groups(Model(), lr=LR, weight_decay=DECAY, multiplier_lr=0.5, multiplier_schedule="constant")
    set_lr_factor(groups, 0.25)
    assert {group["kind"]: group["lr"] for group in groups} == {
        "matrix": LR / 4,
        "multiplier": 0.5,
        "embedding": LR / 4,
        "undecayed": LR / 4,
    }


def test_a_role_that_the_model_lacks_is_refused_with_all_others() -> None:
    from megamult.multipliers.config import MultipliersConfig

    chosen = OptimizerConfig(
        lr_factors={"gate": 0.5, "q": 2.0}, weight_decay_factors={"head": 2.0}, adamw=AdamWConfig()
    )
    message = (
        r"optimizer\.lr_factors\.gate, optimizer\.weight_decay_factors\.head: no .*use one of embedding, k, norm, q, v"
    )
    with pytest.raises(ValueError, match=message):
        make_optimizer(Model(), chosen, MultipliersConfig(), mesh=ALONE)
    multipliers = replace(MultipliersConfig(), lr_factors={"up": 0.5}, weight_decay_factors={"down": {"col": 1.0}})
    with pytest.raises(ValueError, match=r"multipliers\.lr_factors\.up, multipliers\.weight_decay_factors\.down: no"):
        make_optimizer(Model(), OptimizerConfig(), multipliers, mesh=ALONE)
