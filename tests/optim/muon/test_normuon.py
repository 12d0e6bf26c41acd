"""NorMuon against a float64 reference on whole matrices, and what its state takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from megamult import param_groups
from megamult.distributed.mesh import current_mesh
from megamult.optim.adamw import AdamW
from megamult.optim.muon.normuon import NorMuon
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters import megatron
from tests.optim.muon.test_muon import FFN, HIDDEN, LAYOUTS, MULTIPLIER, SIMPLE, Small, gradients, logical
from tests.optim.muon.test_newton_schulz import reference as newton_schulz_reference

LR, DECAY, BETA, BETA2 = 0.02, 0.1, 0.9, 0.7


def train(model: Small, steps: int, scale_of: dict[str, float] | None = None) -> TwoPhaseOptimizer:
    """Steps of NorMuon; gradients of a parameter in `scale_of` are multiplied by its number."""
    groups = param_groups(model, lr=LR, weight_decay=DECAY)
    rule = NorMuon(momentum=BETA, beta2=BETA2)
    optimizer = TwoPhaseOptimizer(groups, AdamW(), {"matrix": rule}, clip_grad_norm=0.0, model=model)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(step)[name] * (scale_of or {}).get(name, 1.0)
        optimizer.step()
    return optimizer


def reference(weight: Tensor, gradient_of: list[Tensor]) -> Tensor:
    """The algorithm of arXiv 2510.05491 in float64: one matrix, whole."""
    momentum, moment = torch.zeros_like(weight), torch.zeros(weight.shape[0], dtype=torch.float64)
    for g in gradient_of:
        momentum = BETA * momentum + (1 - BETA) * g
        o = newton_schulz_reference(BETA * momentum + (1 - BETA) * g, SIMPLE)
        moment = BETA2 * moment + (1 - BETA2) * (o * o).mean(dim=1)
        normalized = o / (moment.sqrt() + 1e-8)[:, None]
        rows, cols = weight.shape
        size = 0.2 * math.sqrt(rows * cols) / torch.linalg.matrix_norm(normalized)
        weight = weight - LR * (DECAY * weight + size * normalized)
    return weight


def test_steps_are_those_of_a_float64_reference() -> None:
    model = Small(LAYOUTS | {"row_multiplier": MULTIPLIER})
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    train(model, 4)
    for name in ("qkv", "gate_up", "down"):
        actual = logical(name, getattr(model, name).detach().double())
        for part, w in logical(name, before[name]).items():
            expected = reference(w, [logical(name, gradients(step)[name].double())[part] for step in range(4)])
            # As in test_muon.py; a row's own size, by which it is divided, doubles its rounding.
            difference = torch.linalg.vector_norm(actual[part] - expected)
            assert difference < 2e-4 * torch.linalg.vector_norm(expected - w), (name, part)


def test_every_update_has_the_root_mean_square_that_learning_rates_of_adamw_are_made_for() -> None:
    rule = NorMuon(ns_form="standard")
    rule.choose_methods({(40, 12)}, torch.float32, current_mesh())
    batch = torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(1))
    state = {"second_moment": torch.zeros(3, 40)}
    update = rule.update(batch, state)
    assert update.square().mean((1, 2)).sqrt().tolist() == pytest.approx([0.2] * 3, rel=1e-6)
    # From nothing, v is (1 - beta2) of each row's mean square: all rows get one size.
    assert torch.allclose(update.square().mean(2).sqrt(), torch.full((3, 40), 0.2), rtol=1e-5)


def test_a_zero_matrix_has_a_zero_update() -> None:
    rule = NorMuon(ns_form="standard")
    rule.choose_methods({(4, 6)}, torch.float32, current_mesh())
    assert not rule.update(torch.zeros(1, 4, 6), {"second_moment": torch.zeros(1, 4)}).any()


def test_the_second_moment_is_one_number_per_row_of_every_logical_matrix() -> None:
    optimizer = train(Small(LAYOUTS), 1)
    rows = {name: values.shape for _, name, values in optimizer.row_views(optimizer._own_partition())}
    heads = {"q.qkv": (24,), "k.qkv": (8,), "v.qkv": (8,)}
    assert rows == heads | {"gate.gate_up": (FFN,), "up.gate_up": (FFN,), "down": (HIDDEN,)}
    assert optimizer.state_bytes["second_moment"] == 4 * (24 + 8 + 8 + 2 * FFN + HIDDEN)


def test_two_rules_of_one_name_keep_their_rows_side_by_side() -> None:
    model = Small({"down": LAYOUTS["down"], "head": megatron.vocabulary("head", 7, 7, HIDDEN)})
    rules = {"matrix": NorMuon(), "head": NorMuon()}
    optimizer = TwoPhaseOptimizer(param_groups(model, lr=LR, weight_decay=DECAY), AdamW(), rules, model=model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    rows = {name: values for _, name, values in optimizer.row_views(optimizer._own_partition())}
    assert {name: len(values) for name, values in rows.items()} == {"down": HIDDEN, "head": 7}
    assert all(bool((values > 0).all()) for values in rows.values())


def test_a_state_dict_brings_the_second_moment_back() -> None:
    first, second = Small(LAYOUTS), Small(LAYOUTS)
    trained = train(first, 3)
    second.load_state_dict(first.state_dict())
    groups = param_groups(second, lr=LR, weight_decay=DECAY)
    rules = {"matrix": NorMuon(momentum=BETA, beta2=BETA2)}
    other = TwoPhaseOptimizer(groups, AdamW(), rules, clip_grad_norm=0.0, model=second)
    other.load_state_dict(copy.deepcopy(trained.state_dict()))  # torch shares tensors that it loads
    for optimizer, model in ((trained, first), (other, second)):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(3)[name]
        optimizer.step()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta2": 1.0}, r"beta2 is 1.0: it must be in \[0, 1\)"),
        ({"scale": "spectral"}, "scale is 'spectral': NorMuon fixes the size of its update: remove scale"),
    ],
)
def test_a_setting_that_is_not_possible_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NorMuon(**settings)  # type: ignore[arg-type]
