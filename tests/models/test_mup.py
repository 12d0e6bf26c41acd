"""muP's factors against its table, against the condition that they come from, and in a model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megamult.config import Config
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.mup import mup
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig

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


@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize("groups", [8, 2])
def test_muon_s_updates_keep_the_spectral_condition(scale: str, groups: int) -> None:
    """The spectral norm of an update is sqrt(rows / cols) times the same constant at both widths."""
    from megamult.models.llama.mup import _shapes
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


@pytest.mark.parametrize("learned", [False, True])
def test_its_keys_make_a_configuration(learned: bool) -> None:
    keys = mup(WIDE, BASE).overrides(learned)
    config = Config(
        model=replace(WIDE, **keys["model"]),
        optimizer=OptimizerConfig(**keys["optimizer"]),
        multipliers=MultipliersConfig(**keys["multipliers"]),
    )
    initial = config.multipliers.initial_values()
    assert initial.value("head", "scalar") == 0.25 and not initial.divide_weights
    assert config.multipliers.by_side("lr_factors") == ({} if learned else {("head", "scalar"): 0.0})
    assert config.model.init_std_factors["q"] == 0.5
