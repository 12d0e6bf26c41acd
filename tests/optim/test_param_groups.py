"""Param groups: by kind, every parameter once, nothing guessed from names or local shapes."""

from __future__ import annotations

import pytest
import torch

from megamult import param_groups
from megamult.multipliers import specs
from megamult.parameters import megatron, spec
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import set_spec

QKV = megatron.fused_qkv(4, 2, 4, 16)
STATED: dict[str, ParameterSpec] = {
    "embedding_weight": megatron.vocabulary("embedding", 20, 128, 16),
    "qkv_weight": QKV,
    "qkv_row": specs.row_multiplier(QKV, [0, 1], False),
    "qkv_col": specs.col_multiplier(QKV, [0, 2], False),
    "out_weight": megatron.single_matrix("attention_out", 16, 16, 1),
    "out_scalar": specs.scalar_multiplier(megatron.single_matrix("attention_out", 16, 16, 1), [0], False),
    "final_norm": megatron.norm(16, False),
    "head_weight": megatron.vocabulary("head", 20, 128, 16),
}
KINDS = {
    "matrix": {"qkv_weight", "out_weight"},
    "multiplier": {"qkv_row", "qkv_col", "out_scalar"},
    "undecayed": {"final_norm"},
    "embedding": {"embedding_weight"},
    "head": {"head_weight"},
}


def model(stated: dict[str, ParameterSpec] = STATED) -> torch.nn.Module:
    """Parameters that look like vectors, as all do to a rank under ZeRO 3: only the layouts say what they are."""
    module = torch.nn.Module()
    for name, what in stated.items():
        parameter = torch.nn.Parameter(torch.empty(0))
        set_spec(parameter, what)
        module.register_parameter(name, parameter)
    return module


def test_every_parameter_is_in_exactly_one_group_the_one_of_its_kind() -> None:
    made = model()
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = param_groups(made, lr=0.1, weight_decay=0.2)
    found = {group["kind"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}
    assert {kind: set(members) for kind, members in found.items()} == KINDS
    assert sum(len(members) for members in found.values()) == len(STATED)


def test_norms_do_not_decay_multipliers_have_a_rate_and_decay_of_their_own() -> None:
    groups = param_groups(model(), lr=0.1, weight_decay=0.2, multiplier_lr=0.7, multiplier_weight_decay=0.03)
    assert {group["kind"]: (group["weight_decay"], group["lr"]) for group in groups} == {
        "matrix": (0.2, 0.1),
        "embedding": (0.2, 0.1),
        "head": (0.2, 0.1),
        "undecayed": (0.0, 0.1),
        "multiplier": (0.03, 0.7),
    }
    assert all(group["peak_lr"] == group["lr"] for group in groups)


def test_multipliers_take_the_common_rate_and_the_papers_decay_by_default() -> None:
    (group,) = [g for g in param_groups(model(), lr=0.1, weight_decay=0.2) if g["kind"] == "multiplier"]
    assert (group["lr"], group["peak_lr"], group["weight_decay"]) == (0.1, 0.1, 2e-3)


def test_a_kind_that_the_model_lacks_makes_no_group() -> None:
    plain = {name: what for name, what in STATED.items() if what.side is None}
    assert "multiplier" not in [group["kind"] for group in param_groups(model(plain), lr=0.1, weight_decay=0.2)]


def test_a_frozen_parameter_is_in_no_group() -> None:
    made = model()
    made.get_parameter("head_weight").requires_grad_(False)
    assert "head" not in [group["kind"] for group in param_groups(made, lr=0.1, weight_decay=0.2)]


def test_a_shared_parameter_is_in_one_group_once() -> None:
    made = model()
    made.register_parameter("tied", made.get_parameter("embedding_weight"))
    groups = param_groups(made, lr=0.1, weight_decay=0.2)
    assert sum(len(group["params"]) for group in groups) == len(STATED)


def test_a_one_dimensional_matrix_cannot_be_stated() -> None:
    part, segment = spec.Part("", "down", (16,)), spec.Segment(0, 0, 0, 16)
    with pytest.raises(ValueError, match=r"\(16,\).*two dimensions.*orthogonalize=False"):
        ParameterSpec((part,), (16,), (segment,), orthogonalize=True)


def test_a_parameter_without_layout_is_refused_with_its_name_and_shape() -> None:
    made = model()
    made.register_parameter("stranger", torch.nn.Parameter(torch.ones(3, 2)))
    with pytest.raises(ValueError, match=r"stranger of shape \(3, 2\) has no spec: .*set_spec"):
        param_groups(made, lr=0.1, weight_decay=0.2)
