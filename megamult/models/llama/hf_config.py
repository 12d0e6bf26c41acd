"""Conversion between our ModelConfig and Hugging Face's LlamaConfig.

If a LlamaConfig describes a function that our model cannot compute, the conversion raises a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megamult.models.llama.config import ModelConfig

# Maps a field of ModelConfig to (Hugging Face's field, the value that transformers assumes if that field is absent).
_SIZES = {
    "num_layers": ("num_hidden_layers", 32),
    "hidden_size": ("hidden_size", 4096),
    "num_attention_heads": ("num_attention_heads", 32),
    "ffn_hidden_size": ("intermediate_size", 11008),
    "seq_length": ("max_position_embeddings", 2048),
    "vocab_size": ("vocab_size", 32000),
}
_NUMBERS = {"norm_eps": ("rms_norm_eps", 1e-6), "init_std": ("initializer_range", 0.02)}
_ROTARY_BASE = 10000.0

# Maps a field of config.json to its allowed values, and to the remedy if it has another. None among the values means
# that the field may be absent or null.
_TRAIN_WITHOUT = "if the model computes the same without this field, remove it; otherwise the model cannot be imported"
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("llama",), "import a model of the Llama architecture"),
    "architectures": ((["LlamaForCausalLM"], None), "import a LlamaForCausalLM"),
    "hidden_act": (("silu", "swish", None), "the MLP here is SwiGLU, so this model cannot be imported"),
    "attention_bias": ((False, None), "no matrix here has a bias, so this model cannot be imported"),
    "mlp_bias": ((False, None), "no matrix here has a bias, so this model cannot be imported"),
    "attention_dropout": ((0, None), "there is no dropout here; set it to 0.0 to train without dropout"),
    "sliding_window": ((None,), "attention here sees the whole sequence; " + _TRAIN_WITHOUT),
    "quantization_config": ((None,), "weights here are not quantized; dequantize and save the model first"),
    "partial_rotary_factor": ((1, None), "a head is rotated as a whole here, so this model cannot be imported"),
}


def to_hugging_face(
    sizes: ModelConfig, vocab_size: int, *, tied: bool, dtype: str, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json for an exported model.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
        tied: whether the exported model has one tensor for embedding and head.
        dtype: dtype of the weights, a key of :data:`megamult.models.common.hugging_face.DTYPES`.
        token_ids: ids of the tokenizer's special tokens, by their keys in config.json such as `bos_token_id`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.query_groups,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.seq_length,
        "initializer_range": sizes.init_std,
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": {"rope_theta": sizes.rotary_base, "rope_type": "default"},
        # Versions of transformers before 5 read only this field. Without it, they silently use 10000.
        "rope_theta": sizes.rotary_base,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "use_cache": True,
        # If these fields are absent, transformers assumes 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
        **token_ids,
    }


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """Return the sizes of the model that config.json describes.

    Fields that do not change the function which the model computes are ignored.

    Args:
        config: the content of config.json.

    Raises:
        ValueError: a field asks for a function that our model cannot compute, or has an impossible value.
    """
    for field, (allowed, remedy) in _MUST_BE.items():
        if config.get(field) not in allowed:
            raise ValueError(f"config.json: {field} is {config.get(field)!r}, not {allowed[0]!r}: {remedy}")
    layers = config.get("layer_types")
    if layers is not None and any(kind != "full_attention" for kind in layers):
        raise ValueError(f"config.json: layer_types is {layers!r}: megamult has only full attention; {_TRAIN_WITHOUT}")
    sizes = {ours: _positive_integer(config, *theirs) for ours, theirs in _SIZES.items()}
    numbers = {ours: _number(config, *theirs) for ours, theirs in _NUMBERS.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    groups = _positive_integer(config, "num_key_value_heads", heads)
    head = _positive_integer(config, "head_dim", hidden // heads)
    if head * heads != hidden or head % 2:
        raise ValueError(
            f"config.json: head_dim is {head} with num_attention_heads {heads} and hidden_size {hidden}: "
            "megamult needs an even head_dim, and num_attention_heads * head_dim equal to hidden_size, so this model "
            "cannot be imported"
        )
    if heads % groups:
        raise ValueError(
            f"config.json: num_key_value_heads is {groups}: it must divide num_attention_heads ({heads}); correct it"
        )
    return ModelConfig(
        num_layers=sizes["num_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=sizes["ffn_hidden_size"],
        seq_length=sizes["seq_length"],
        vocab_size=sizes["vocab_size"],
        rotary_base=_rotary_base(config),
        norm_eps=numbers["norm_eps"],
        init_std=numbers["init_std"],
        tie_embeddings=bool(config.get("tie_word_embeddings") or False),
    )


def _rotary_base(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary embedding, `rope_theta`; 10000 if config.json does not have it.

    transformers 5 writes `rope_theta` into `rope_parameters`. Older versions write it at the top level, beside
    `rope_scaling`. All places are read, and must agree.
    """
    bases = {}
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        where = f"config.json: {field} is {rope!r}"
        if not isinstance(rope, Mapping):
            raise ValueError(f"{where}, not a mapping: correct it")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"{where}: megamult has only unscaled rotary positions (rope_type default): import another model"
            )
        rest = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
        if rest.pop("partial_rotary_factor", 1) != 1 or any(value is not None for value in rest.values()):
            raise ValueError(
                f"{where}: of the rotary embedding's settings only rope_theta and rope_type 'default' can be imported"
            )
        if rope.get("rope_theta") is not None:
            bases[field] = _number(rope, "rope_theta", None)
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = _number(config, "rope_theta", None)
    if len(set(bases.values())) > 1:
        raise ValueError(f"config.json gives different bases of the rotary embedding, {bases}: keep the right one")
    return next(iter(bases.values()), _ROTARY_BASE)


def _positive_integer(config: Mapping[str, Any], field: str, default: int) -> int:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {field} is {value!r}: it must be a positive whole number; correct it")
    return value


def _number(config: Mapping[str, Any], field: str, default: float | None) -> float:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {field} is {value!r}: it must be a positive number; correct it")
    return float(value)
