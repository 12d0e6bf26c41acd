"""Conversion between FalconH1Config and the config.json of Hugging Face's FalconH1ForCausalLM.

A Falcon-H1 model computes with constant factors, the forward multipliers of its config.json. An import merges them into
the weights, or makes them initial values of learnable multipliers; an export has all of them at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megamult.models.common import hf_config
from megamult.models.common.hf_fields import Fields
from megamult.models.common.mamba2.roles import IN_PROJECTION
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.parameters.spec import Role, Side

MODEL_TYPE, HUGGING_FACE_CLASS = "falcon_h1", "FalconH1ForCausalLM"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_norm_before_gate": True,
}
"""Values that transformers assumes for absent fields."""

# Maps a field of FalconH1Config to Hugging Face's field.
_SIZES = {
    "ssm_heads": "mamba_n_heads",
    "ssm_state_size": "mamba_d_state",
    "ssm_groups": "mamba_n_groups",
    "ssm_kernel": "mamba_d_conv",
    "ssm_chunk": "mamba_chunk_size",
}

_MUST_BE: hf_config.MustBe = {
    "mamba_proj_bias": ((False, None), "the mixer's projections have no bias here, so this model cannot be imported"),
    "projectors_bias": ((False, None), "the mixer's projections have no bias here, so this model cannot be imported"),
}

# Maps a field to the roles whose biases it adds and whose outputs transformers multiplies after the bias.
_SCALED_BIASES: Mapping[str, tuple[Role, ...]] = {
    "attention_bias": ("k", "attention_out"),
    "mlp_bias": ("gate", "down"),
}


def to_hugging_face(
    sizes: FalconH1Config,
    vocab_size: int,
    *,
    tied: bool,
    dtype: str,
    token_ids: Mapping[str, Any],
    embedding_factor: float = 1.0,
) -> dict[str, Any]:
    """Return the content of config.json for an exported model. All forward multipliers but the embedding's are 1.

    :class:`megamult.models.common.architecture.ToHuggingFace` describes the arguments.

    Raises:
        ValueError: FalconH1ForCausalLM cannot express the model. The message names all keys that it lacks.
    """
    lacking = {
        "layers": set(sizes.layer_kinds) != {"H"},
        "qk_norm": sizes.qk_norm,
        "attention_bias": sizes.attention_bias == "qkv",
        "no_rope_layers": bool(sizes.no_rope_layers),
    }
    if wrong := [f"model.{key} {getattr(sizes, key)!r}" for key, found in lacking.items() if found]:
        raise ValueError(
            f"FalconH1ForCausalLM has no {' and no '.join(wrong)}: the model can be trained but not exported; change "
            "this before training"
        )
    mixer = sizes.mixer
    described = hf_config.written(
        sizes, vocab_size, MODEL_TYPE, HUGGING_FACE_CLASS, tied=tied, dtype=dtype, token_ids=token_ids
    )
    return described | {
        "attention_bias": sizes.attention_bias == "all",
        "mlp_bias": sizes.mlp_bias,
        "projectors_bias": False,
        "mamba_d_ssm": mixer.inner,
        "mamba_n_heads": mixer.heads,
        "mamba_d_head": mixer.head_dim,
        "mamba_n_groups": mixer.groups,
        "mamba_d_state": mixer.state,
        "mamba_d_conv": mixer.kernel,
        "mamba_chunk_size": mixer.chunk,
        "mamba_conv_bias": mixer.conv_bias,
        "mamba_proj_bias": False,
        "mamba_rms_norm": mixer.norm != "none",
        "mamba_norm_before_gate": mixer.norm == "before_gate",
        "embedding_multiplier": embedding_factor,
        "lm_head_multiplier": 1.0,
        "key_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "ssm_multipliers": [1.0] * 5,
        "mlp_multipliers": [1.0, 1.0],
    }


def from_hugging_face(config: Mapping[str, Any]) -> FalconH1Config:
    """Return the sizes of the model that config.json describes. Forward multipliers are not among them.

    Raises:
        ValueError: fields ask for a function that our model cannot compute, or have impossible values. The message
            lists them all.
    """
    fields = Fields(config, _DEFAULTS)
    common = hf_config.read(fields, HUGGING_FACE_CLASS, _MUST_BE)
    _check_time_steps(fields)
    sizes: dict[str, Any] = {ours: fields.integer(theirs) for ours, theirs in _SIZES.items()}
    if "mamba_d_ssm" in config and config["mamba_d_ssm"] is None:
        inner = int(fields.number("mamba_expand") * common["hidden_size"])
    else:
        inner = fields.integer("mamba_d_ssm", 1024)
    auto = config.get("mamba_d_head") in ("auto", None)
    size = inner // sizes["ssm_heads"] if auto else fields.integer("mamba_d_head")
    if size * sizes["ssm_heads"] != inner or sizes["ssm_heads"] % sizes["ssm_groups"]:
        fields.mistakes.append(
            f"mamba_n_heads is {sizes['ssm_heads']} with mamba_d_head {size}, mamba_d_ssm {inner} and mamba_n_groups "
            f"{sizes['ssm_groups']}: heads of equal size must fill mamba_d_ssm, and groups must have equally many; "
            "correct them"
        )
    normed = fields.flag("mamba_rms_norm")
    found: dict[str, Any] = {
        "attention_bias": "all" if fields.flag("attention_bias") else "none",
        "mlp_bias": fields.flag("mlp_bias"),
        "ssm_head_dim": size,
        "ssm_norm": ("before_gate" if fields.flag("mamba_norm_before_gate") else "after_gate") if normed else "none",
        "ssm_conv_bias": fields.flag("mamba_conv_bias"),
    }
    factors = _table(fields)  # notes wrong ones
    biased = [field for field in _SCALED_BIASES if fields.get(field) is True]
    scaled = [field for field in biased if any(factors[role, "row"] != 1 for role in _SCALED_BIASES[field])]
    if scaled:
        roles = ", ".join(role for field in scaled for role in _SCALED_BIASES[field])
        fields.mistakes.append(
            f"{' and '.join(scaled)} is true, and the forward multipliers of the outputs of {roles} are not all 1: "
            "they scale biases too, which multipliers here do not, so this model cannot be imported"
        )
    fields.check()
    return FalconH1Config(**common, **sizes, **found)


def _check_time_steps(fields: Fields) -> None:
    """Note a limit of the mixer's step sizes."""
    limit = fields.config.get("time_step_limit")
    if limit is None:
        return
    # transformers 5 writes infinity, which JSON does not have, as {"__float__": "Infinity"}.
    plain = [each.get("__float__") if isinstance(each, Mapping) else each for each in _listed(limit)]
    if len(plain) != 2 or plain[0] != 0 or plain[1] not in (math.inf, "Infinity"):
        fields.wrong("time_step_limit", limit, "step sizes are not limited here, so this model cannot be imported")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def forward_multipliers(config: Mapping[str, Any]) -> dict[tuple[Role, Side], float]:
    """Return the factors of a config.json as multipliers of effective weights, by role and side.

    The head has no multipliers: its factor is that of the final norm's weights, under ("final_norm", "row").
    """
    fields = Fields(config, _DEFAULTS)
    found = _table(fields)
    fields.check()
    return found


def _table(fields: Fields) -> dict[tuple[Role, Side], float]:
    """Return the factors, and note those that are no numbers."""

    def one(name: str) -> float:
        value = fields.get(f"{name}_multiplier", 1.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value == 0:
            fields.wrong(f"{name}_multiplier", value, "it must be a finite number other than 0; correct it")
            return 1.0
        return float(value)

    def several(name: str, count: int) -> list[float]:
        values = fields.get(name, [1.0] * count)
        good = isinstance(values, (list, tuple)) and len(values) == count
        if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) and v != 0 for v in values):
            fields.wrong(name, values, f"it must be {count} finite numbers other than 0; correct it")
            return [1.0] * count
        return [float(value) for value in values]

    into_attention, into_mixer = one("attention_in"), one("ssm_in")
    gate, down = several("mlp_multipliers", 2)
    return {
        ("embedding", "row"): one("embedding"),
        ("final_norm", "row"): one("lm_head"),
        ("q", "col"): into_attention,
        ("k", "col"): into_attention,
        ("v", "col"): into_attention,
        ("k", "row"): one("key"),
        ("attention_out", "row"): one("attention_out"),
        **dict(zip(((role, "row") for role in IN_PROJECTION), several("ssm_multipliers", 5), strict=True)),
        **{(role, "col"): into_mixer for role in IN_PROJECTION},
        **{(role, "row"): one("ssm_out") for role in ("ssm_out", "ssm_out_normed")},
        ("gate", "row"): gate,
        ("down", "row"): down,
    }
