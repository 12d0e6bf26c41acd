"""Roles of a model: named placements give multipliers to these only, and keys that name others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megamult.config import Config
from megamult.models.common.config import DecoderConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.roles import ROLES, resolve

BOTH = {"row", "col"}
ATTENTION = {"q": BOTH, "k": BOTH, "v": BOTH, "attention_out": BOTH}
MLP = {"gate": BOTH, "up": BOTH, "down": BOTH}


def test_named_placements_name_roles_of_the_model_only() -> None:
    from megamult.models.falcon_h1 import roles  # registers those of mixers

    assert "ssm_z" in roles.IN_MIXER and "ssm_z" in ROLES and "ssm_z" not in ModelConfig().roles
    assert resolve("all", ModelConfig().roles) == ATTENTION | MLP | {"embedding": BOTH}
    assert resolve("all", roles.IN_MIXER)["ssm_z"] == BOTH
    config = Config()
    assert config.multipliers.sides(config.model.roles) == resolve("all")


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
def test_a_role_that_the_model_does_not_have_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} names the role 'ssm_z'") as error:
        made(ModelConfig(), SECTIONS[key]("ssm_z"))
    assert "ssm" not in str(error.value).replace("'ssm_z'", ""), "a remedy names roles that the model has"
    made(ModelConfig(), SECTIONS[key]("down"))


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
