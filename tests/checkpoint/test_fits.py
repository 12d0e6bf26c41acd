"""A resumed run must keep what the checkpoint's weights and samples mean: fields say so themselves."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.resume import check_fits, lost_multipliers
from megamult.config import SECTIONS, Config, ModelConfig
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.multipliers.config import MultipliersConfig
from megamult.settings import fixed_keys

VOCAB = 300
FREE = {
    "vocab_size": "null is the tokenizer's: the sizes that result are compared, as model.vocab_size",
    "architecture": "decides what the other keys are, so that it is compared first",
    "init_std": "initial weights are the checkpoint's",
    "init_std_factors": "of a new model only",
    "z_loss": "part of the objective, not of the model",
}
"""Keys of the model that a resumed run may change, or that are compared in another way."""
OTHER: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 512,
    "num_attention_heads": 16,
    "head_dim": 48,
    "num_query_groups": 4,
    "ffn_hidden_size": 700,
    "seq_length": 128,
    "rotary_base": 5e5,
    "rotary_scaling": {"rope_type": "linear", "factor": 2.0},
    "no_rope_layers": [3, 1],
    "attention_bias": "qkv",
    "mlp_bias": True,
    "qk_norm": True,
    "norm_eps": 1e-6,
    "norms": "scalar",
    "final_norm": "frozen",
    "tie_embeddings": True,
}
"""Another possible value for each of the rest."""


def info(samples: int = 16, **model: Any) -> CheckpointInfo:
    """A checkpoint of a run of defaults, but for the model's keys that are given."""
    config = json.loads(json.dumps(dataclasses.asdict(Config(model=ModelConfig(**model)))))
    return CheckpointInfo(step=1, samples=samples, config=config, vocab_size=VOCAB)


def message(found: CheckpointInfo, config: Config | None = None) -> str:
    """What is in the way of going on from it; empty: nothing."""
    try:
        check_fits(found, config or Config(), VOCAB, None)
    except ValueError as error:
        return str(error)
    return ""


def test_every_key_of_the_model_is_kept_or_is_free_for_a_reason() -> None:
    kept = set(fixed_keys(ModelConfig))
    assert not kept & set(FREE)
    assert kept | set(FREE) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert kept == set(OTHER)


def test_no_other_section_has_settings_to_keep_but_the_seed_of_the_data() -> None:
    """A new one is compared, too, and belongs into this list and into `test_another_order...`."""
    assert {name: fixed_keys(section) for name, section in SECTIONS.items() if fixed_keys(section)} == {
        "model": list(OTHER),
        "train": ["seed"],
    }


@pytest.mark.parametrize("key", OTHER)
def test_another_model_is_refused_with_both_values(key: str) -> None:
    its, mine = getattr(ModelConfig(**{key: OTHER[key]}), key), getattr(ModelConfig(), key)
    resolved = {
        "num_query_groups": (8, 4),  # null: as many as query heads
        "head_dim": (32, 48),  # null: hidden_size / heads
        "no_rope_layers": ([], [1, 3]),
    }
    mine, its = resolved.get(key, (mine, its))
    assert f"model.{key} is {mine!r} and the checkpoint's is {its!r}" in message(info(**{key: OTHER[key]}))


def test_another_architecture_is_refused_before_its_keys_are_read() -> None:
    said = message(info(), Config(model=FalconH1Config()))
    assert "model.architecture is 'falcon_h1' and the checkpoint's is 'llama': set it back" in said
    old = info()
    del old.config["model"]["architecture"]  # as versions wrote it that knew only Llama
    assert message(old) == ""
    assert "model.architecture is 'falcon_h1' and the checkpoint's is 'llama'" in message(
        old, Config(model=FalconH1Config())
    )


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", VOCAB), ("init_std", 0.5), ("init_std_factors", {"q": 2.0}), ("z_loss", 0.0)]
)
def test_what_is_free_may_change(key: str, value: Any) -> None:
    assert key in FREE
    assert message(info(**{key: value})) == ""


def test_null_query_groups_are_one_for_each_head() -> None:
    assert message(info(num_query_groups=8)) == ""
    said = message(info(num_attention_heads=16, head_dim=32))
    assert said.count("the checkpoint's is 16") == 2 and "head_dim" not in said, "heads, and groups with them"


def test_another_order_of_the_data_is_refused_once_samples_were_seen() -> None:
    config = Config()
    config.train.seed, config.model.seq_length = 7, 128
    assert message(info(samples=0), config) == ""
    said = message(info(samples=16), config)
    assert "model.seq_length is 128 and the checkpoint's is 256" in said
    assert "train.seed (the data's order) is 7 and the checkpoint's is 1234" in said


def test_only_keys_of_the_model_must_be_known() -> None:
    found = info()
    found.config["train"]["from_another_version"] = 1
    found.config["optimizer"]["from_another_version"] = 1
    assert message(found) == ""
    found.config["model"]["from_another_version"] = 1
    said = message(found)
    assert (
        "configuration has keys or values that this version does not know (" in said and "from_another_version" in said
    )
    assert f"use the version that wrote it ({found.versions['megamult']})" in said
    del found.config["train"]
    del found.config["model"]["from_another_version"]
    assert "configuration lacks the section 'train': use the version" in message(found)


def test_a_key_that_the_checkpoints_version_did_not_have_is_the_default() -> None:
    found = info()
    del found.config["model"]["norm_eps"], found.config["train"]["seed"]
    assert message(found) == ""
    config = Config()
    config.train.seed = 7
    assert "train.seed (the data's order) is 7 and the checkpoint's is 1234" in message(found, config)


def test_multipliers_that_are_all_1_may_be_dropped_and_no_others() -> None:
    config = Config(multipliers=MultipliersConfig("folded", {"q": "row", "k": ["row", "col"]}))
    asked: list[tuple[str, str]] = []

    def all_ones(role: str, side: str) -> bool:
        asked.append((role, side))
        return role != "down" and (role, side) != ("v", "col")

    with pytest.raises(ValueError) as refused:
        check_fits(info(), config, VOCAB, None, all_ones)
    assert "gives v no col multipliers, which" in str(refused.value)
    assert "gives down no col and row multipliers, which" in str(refused.value)
    assert "gives q" not in str(refused.value) and "gives embedding" not in str(refused.value)
    assert ("q", "col") in asked and ("q", "row") not in asked and ("k", "col") not in asked
    assert lost_multipliers(info(), config)["q"] == ["col"]
    check_fits(info(), config, VOCAB, None, lambda role, side: True)
    config.optimizer.name = "muon"
    with pytest.raises(ValueError) as refused:
        check_fits(trained(), config, VOCAB, None, lambda role, side: True)
    assert "optimizer.name is 'muon'" in str(refused.value) and "gives q no col" in str(refused.value), "at once"


def trained(**multipliers: Any) -> CheckpointInfo:
    """A checkpoint with optimizer state, of a run with these settings of multipliers."""
    found = info()
    found.config["multipliers"] |= multipliers
    return dataclasses.replace(found, optimizer={"name": "adamw", "updates": 1, "skipped_steps": 0})


def test_columns_that_differ_cannot_be_shared() -> None:
    shared = Config(multipliers=MultipliersConfig(shared_columns=True))
    said = message(trained(), shared)
    assert "shared_columns is True, so that q, k, v would have the same column multipliers, and the checkpoint" in said
    assert "has trained them apart" in said
    assert message(info(), shared) == "", "an imported or averaged model: all multipliers are 1"
    for own in ({"placement": "scalar"}, {"placement": {"attention_out": "col", "q": "row"}}):
        wider = {
            role: ["scalar", "row", "col"] for role in (*"qkv", "attention_out", "gate", "up", "down", "embedding")
        }
        both = Config(multipliers=MultipliersConfig(placement=wider, shared_columns=True))
        assert message(trained(**own), both) == "", "columns that are new start at 1"
    some = {"placement": {"q": ["row", "col"], "k": ["row", "col"], "v": "row"}, "shared_columns": True}
    assert "same column multipliers, and the checkpoint has only those of q, k" in message(trained(**some), shared)
    assert message(trained(**some), Config(multipliers=MultipliersConfig(**some))) == ""
    assert message(trained(shared_columns=True), shared) == "" and message(trained(shared_columns=True)) == ""
