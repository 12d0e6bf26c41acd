"""Roles of a model: named placements give multipliers to these only, and keys that name others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megamult.config import Config
from megamult.models.common.config import DecoderConfig
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.roles import resolve

BOTH, ROW, COL = {"row", "col"}, {"row"}, {"col"}
ATTENTION = {"q": BOTH, "k": BOTH, "v": BOTH, "attention_out": BOTH}
MLP = {"gate": BOTH, "up": BOTH, "down": BOTH}
MIXER = {"ssm_z": BOTH, "ssm_x": BOTH, "ssm_b": BOTH, "ssm_c": BOTH, "ssm_dt": BOTH, "ssm_out": BOTH}
MIXER_NORMED = {("ssm_out_normed" if role == "ssm_out" else role): sides for role, sides in MIXER.items()}


def hybrid(layers: str, **more: Any) -> FalconH1Config:
    return FalconH1Config(num_layers=len(layers), layers=layers, **more)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (ModelConfig(), ATTENTION | MLP),
        (FalconH1Config(), ATTENTION | MLP | MIXER),
        (FalconH1Config(ssm_norm="before_gate"), ATTENTION | MLP | MIXER_NORMED),
        (hybrid("MM"), MIXER),
        (hybrid("M-"), MIXER | MLP),
        (hybrid("*-"), ATTENTION | MLP),
    ],
)
def test_all_scales_the_matrices_that_the_model_has(sizes: DecoderConfig, expected: dict[str, Any]) -> None:
    assert resolve("all", sizes.roles) == expected | {"embedding": BOTH}
    assert resolve("scalar", sizes.roles) == {role: {"scalar"} for role in (*expected, "embedding")}
    assert Config(model=sizes).multipliers.sides(sizes.roles) == resolve("all", sizes.roles)


def test_symmetry_free_of_a_mixer_has_no_sides_that_the_model_keeps_as_other_weights() -> None:
    """x, B and C: the convolution has their rows, the norm before the mixer all columns; an inner norm those of out."""
    mixer = {"ssm_z": ROW, "ssm_dt": ROW, "ssm_out": BOTH, "embedding": BOTH}
    assert resolve("symmetry_free", hybrid("M").roles) == mixer
    normed = {"ssm_z": ROW, "ssm_dt": ROW, "ssm_out_normed": ROW, "embedding": BOTH}
    assert resolve("symmetry_free", hybrid("M", ssm_norm="after_gate").roles) == normed


SECTIONS: dict[str, Any] = {
    "model.init_std_factors": lambda role: {"model": {"init_std_factors": {role: 2.0}}},
    "multipliers.lr_factors": lambda role: {"multipliers": {"lr_factors": {role: 2.0}}},
    "multipliers.weight_decay_factors": lambda role: {"multipliers": {"weight_decay_factors": {role: 2.0}}},
    "multipliers.initial": lambda role: {"multipliers": {"initial": {role: {"row": 2.0, "col": 1.0}}}},
    "multipliers.placement": lambda role: {"multipliers": {"placement": {role: "row"}}},
    "optimizer.lr_factors": lambda role: {"optimizer": {"lr_factors": {role: 2.0}}},
    "optimizer.weight_decay_factors": lambda role: {"optimizer": {"weight_decay_factors": {role: 2.0}}},
}
"""Keys by role, each as sections that name one role."""


def made(sizes: DecoderConfig, sections: dict[str, Any]) -> Config:
    model = type(sizes)(**{**vars(sizes), **sections.get("model", {})})
    return Config(
        model=model,
        multipliers=MultipliersConfig(**sections.get("multipliers", {})),
        optimizer=OptimizerConfig(**sections.get("optimizer", {})),
    )


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize(
    ("sizes", "role"), [(ModelConfig(), "ssm_z"), (hybrid("M"), "q"), (hybrid("*-"), "ssm_out")], ids=str
)
def test_a_role_that_the_model_does_not_have_is_refused(key: str, sizes: DecoderConfig, role: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} names the role '{role}'") as error:
        made(sizes, SECTIONS[key](role))
    assert role not in str(error.value).replace(f"'{role}'", ""), "a remedy names roles that the model has"
    good = next(each for each in ("down", "ssm_z") if each in sizes.roles)
    made(sizes, SECTIONS[key](good))
    made(FalconH1Config(), SECTIONS[key](role))


def test_all_keys_that_name_absent_roles_are_refused_at_once() -> None:
    sections: dict[str, Any] = {
        "model": {"init_std_factors": {"ssm_x": 2.0, "q": -1.0}},
        "multipliers": {
            "placement": {"ssm_z": "row", "up": "left", "q": "row"},
            "lr_factors": {"ssm_dt": 0.5},
            "weight_decay_factors": {"ssm_b": 1.0},
            "initial": {"ssm_c": {"row": 2.0}},
        },
        "optimizer": {"lr_factors": {"ssm_a": 0.1, "ssm_d": 2.0}, "weight_decay_factors": {"ssm_out": 2.0}},
    }
    with pytest.raises(ValueError) as error:
        made(ModelConfig(), sections)
    said = str(error.value).split("; ")
    assert [each.split(":")[0].partition(", which")[0] for each in said] == [
        "model.init_std_factors names the role 'ssm_x'",
        "model.init_std_factors.q is -1.0",
        "multipliers.placement names the role 'ssm_z'",
        "multipliers.placement gives up the side 'left'",
        "multipliers.lr_factors names the role 'ssm_dt'",
        "multipliers.weight_decay_factors names the role 'ssm_b'",
        "multipliers.initial names the role 'ssm_c'",
        "optimizer.lr_factors names the role 'ssm_a'",
        "optimizer.lr_factors names the role 'ssm_d'",
        "optimizer.weight_decay_factors names the role 'ssm_out'",
    ]
    assert str(error.value).count("ssm_") == 8


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"tie_embeddings": True}, "multipliers": {"implementation": "folded"}},
        {"multipliers": {"placement": {"norm": "row"}}},
        {"multipliers": {"lr_factors": {"head": 2.0}}},
        {"optimizer": {"lr_factors": {"heads": 2.0}}},
    ],
)
def test_no_message_about_a_llama_model_names_a_role_of_mixers(sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        made(ModelConfig(), sections)
    assert "down" in str(error.value) and "ssm" not in str(error.value)
