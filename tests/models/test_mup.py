"""muP's factors against its table, against the condition that they come from, and in a model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamult.config import Config
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.mup import _shapes, at_width, mup
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.roles import resolve

BASE = ModelConfig(hidden_size=64, num_attention_heads=2, ffn_hidden_size=176)
WIDE = replace(BASE, hidden_size=256, num_attention_heads=8, ffn_hidden_size=704)
MATRICES = ("q", "k", "v", "attention_out", "gate", "up", "down")


def test_adam_s_factors_are_those_of_the_table() -> None:
    """Table 8 of arXiv 2203.03466 at four times the width; decay as the package `mup` scales it for matrices."""
    found = mup(WIDE, BASE)
    assert found.init_std == dict.fromkeys(MATRICES, 0.5)  # variance 1 / fan_in
    assert found.lr == dict.fromkeys(MATRICES, 0.25)  # 1 / fan_in
    assert found.weight_decay == dict.fromkeys(MATRICES, 4.0)
    assert found.forward == {"head": 0.25}  # output multiplier 1 / fan_in


def test_the_base_width_keeps_everything() -> None:
    for update_norm in (None, lambda rows, cols: float(rows + cols)):
        found = mup(BASE, BASE, update_norm)
        for factors in (found.init_std, found.lr, found.weight_decay, found.forward):
            assert set(factors.values()) == {1.0}


def test_larger_heads_change_the_attention_s_scale() -> None:
    found = mup(replace(WIDE, num_attention_heads=2), BASE)
    # Logits are divided by sqrt(128); muP divides by the size of a head, relative to 32: sqrt(32 / 128).
    assert found.forward["q"] == pytest.approx(0.5)


def test_larger_heads_need_logits_that_a_multiplier_of_q_scales() -> None:
    for options in ({"qk_norm": True}, {"attention_bias": "qkv"}):
        base, wide = (replace(each, **options) for each in (BASE, WIDE))  # type: ignore[arg-type]
        assert "q" not in mup(wide, base).forward, "heads of the same size"
        with pytest.raises(ValueError, match=r"size of a head is 128, and 32 at the base width: .* model\.head_dim"):
            mup(replace(wide, num_attention_heads=2), base)


def test_heads_of_their_own_size_count_as_columns_of_the_output_projection() -> None:
    base = replace(BASE, head_dim=48)
    wide = replace(base, hidden_size=256)  # as many heads and features: two matrices have as many columns
    found = mup(wide, base)
    assert found.lr == {**dict.fromkeys(MATRICES, 0.25), "attention_out": 1.0, "down": 1.0}
    assert at_width(wide, 128) == replace(
        wide, hidden_size=128, num_attention_heads=1, num_query_groups=1, ffn_hidden_size=88
    )


@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize("groups", [8, 2])
def test_muon_s_updates_keep_the_spectral_condition(scale: str, groups: int) -> None:
    """The spectral norm of an update is sqrt(rows / cols) times the same constant at both widths."""
    from megamult.optim.muon.newton_schulz import scale as scale_factor

    wide = replace(WIDE, num_query_groups=groups)
    found = mup(wide, BASE, lambda rows, cols: scale_factor(rows, cols, scale))
    for role, (rows, cols) in _shapes(wide).items():
        narrow_rows, narrow_cols = _shapes(BASE)[role]
        # An orthogonalized matrix has the spectral norm 1, so that of an update is its scale.
        now = found.lr[role] * scale_factor(rows, cols, scale) / math.sqrt(rows / cols)
        then = scale_factor(narrow_rows, narrow_cols, scale) / math.sqrt(narrow_rows / narrow_cols)
        assert now == pytest.approx(then, rel=1e-12), role
        assert found.lr[role] * found.weight_decay[role] == pytest.approx(1.0, rel=1e-12)


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tie_embeddings is true: .*set it to false"):
        mup(replace(WIDE, tie_embeddings=True), BASE)


def test_adam_s_factors_follow_the_columns_of_each_matrix() -> None:
    found = mup(replace(WIDE, ffn_hidden_size=BASE.ffn_hidden_size), BASE)
    assert found.lr["down"] == found.init_std["down"] == 1.0  # as many columns as at the base width
    assert found.lr["gate"] == found.lr["up"] == 0.25


@pytest.mark.parametrize("learned", [False, True])
def test_its_keys_make_a_configuration(learned: bool) -> None:
    keys = mup(WIDE, BASE).overrides(WIDE, OptimizerConfig(), MultipliersConfig("none"), learned)
    config = configured(keys)
    initial = config.multipliers.initial_values()
    assert initial.value("head", "scalar") == 0.25 and not initial.divide_weights
    # A scalar that begins at 1/4 moves a quarter as far, so that its relative change is that at the base width.
    assert config.multipliers.by_side("lr_factors") == {("head", "scalar"): 0.25 if learned else 0.0}
    assert config.model.init_std_factors["q"] == 0.5


def configured(keys: dict[str, Any]) -> Config:
    return Config(
        model=replace(WIDE, **keys["model"]),
        optimizer=OptimizerConfig(**keys["optimizer"]),
        multipliers=MultipliersConfig(**keys["multipliers"]),
    )


def test_a_run_keeps_its_own_settings_beside_those_of_mup() -> None:
    own = MultipliersConfig("folded", {"q": ["row", "col"], "head": "col"}, lr_factors={"head": 0.5, "q": {"row": 2.0}})
    optimizer = OptimizerConfig(lr_factors={"head": 0.5, "q": 2.0}, weight_decay_factors={"q": 0.5})
    keys = mup(WIDE, BASE).overrides(replace(WIDE, init_std_factors={"down": 16.0}), optimizer, own)
    config = configured(keys)
    assert config.multipliers.implementation == "folded"
    assert resolve(config.multipliers.placement) == {"q": {"row", "col"}, "head": {"col", "scalar"}}
    assert config.multipliers.by_side("lr_factors") == {
        ("head", "col"): 0.5,
        ("head", "scalar"): 0.0,
        ("q", "row"): 2.0,
    }
    assert (config.optimizer.lr_factors["head"], config.optimizer.lr_factors["q"]) == (0.5, 0.5)
    assert config.optimizer.weight_decay_factors["q"] == 2.0 and config.model.init_std_factors["down"] == 8.0


def test_at_the_base_width_only_a_head_factor_of_1_is_added() -> None:
    keys = mup(BASE, BASE).overrides(BASE, OptimizerConfig(), MultipliersConfig())
    assert set(keys["optimizer"]["lr_factors"].values()) == {1.0}
    placement = resolve(keys["multipliers"]["placement"])
    assert placement.pop("head") == {"scalar"} and placement == resolve("all")
    assert keys["multipliers"]["initial"] == {"head": {"scalar": 1.0}}


def test_another_architecture_is_refused() -> None:
    said = "architecture is 'falcon_h1': muP's factors are known here for llama only"
    with pytest.raises(ValueError, match=said):
        mup(FalconH1Config(), BASE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        at_width(FalconH1Config(), 64)  # type: ignore[arg-type]


def test_matrices_of_fixed_norm_get_no_decay_and_divided_starts_are_refused() -> None:
    keys = mup(WIDE, BASE).overrides(WIDE, OptimizerConfig(), MultipliersConfig(norm="fixed"))
    assert keys["optimizer"]["weight_decay_factors"] == {}
    with pytest.raises(ValueError, match=r"divide_weights is true and .*Set multipliers\.divide_weights to false"):
        mup(WIDE, BASE).overrides(WIDE, OptimizerConfig(), MultipliersConfig(initial={"q": {"row": 2.0}}))


def test_adam_s_factors_are_those_of_the_package_mup() -> None:
    """Learning rate and decay from its MuAdamW, initial deviation from its normal_, the head's factor from its
    MuReadout, for layers of the model's shapes at the base width and four times that."""
    package = pytest.importorskip("mup", reason="pip install --no-deps mup, whose requirements this test does not need")

    def layers(sizes: ModelConfig) -> torch.nn.ModuleDict:
        matrices = {role: torch.nn.Linear(cols, rows, bias=False) for role, (rows, cols) in _shapes(sizes).items()}
        return torch.nn.ModuleDict(
            {
                **matrices,
                "embedding": torch.nn.Embedding(1000, sizes.hidden_size),
                "norm": torch.nn.RMSNorm(sizes.hidden_size),
                "head": package.MuReadout(sizes.hidden_size, 1000, bias=False),
            }
        )

    wide = layers(WIDE)
    delta = layers(replace(BASE, hidden_size=128, num_attention_heads=4, ffn_hidden_size=352))
    package.set_base_shapes(wide, layers(BASE), delta=delta, rescale_params=False)
    groups = package.MuAdamW(wide.parameters(), lr=1.0, weight_decay=1.0).param_groups
    theirs = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = mup(WIDE, BASE)
    torch.manual_seed(1)
    for role, layer in wide.items():
        rates = found.lr.get(role, 1.0), found.weight_decay.get(role, 1.0)
        assert theirs[id(layer.weight)] == pytest.approx(rates), role
        if role in MATRICES:
            package.init.normal_(layer.weight, std=1.0)
            # The deviation of 65,536 or more normal numbers is known to 1 / sqrt(2 x 65,536) = 0.3 %.
            assert float(layer.weight.std()) == pytest.approx(found.init_std[role], rel=0.015), role
    head, x = wide["head"], torch.randn(3, WIDE.hidden_size)
    torch.testing.assert_close(head(x), found.forward["head"] * torch.nn.functional.linear(x, head.weight))
