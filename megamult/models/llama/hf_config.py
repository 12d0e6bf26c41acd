"""Conversion between our ModelConfig and the config.json of Hugging Face's families.

If a config.json describes a function that our model cannot compute, the conversion raises a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.models.llama import hf_rotary
from megamult.models.llama.config import AttentionBias, ModelConfig
from megamult.models.llama.families import FAMILIES, family_of
from megamult.models.llama.hf_fields import Fields

# Maps a field of ModelConfig to Hugging Face's field.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "seq_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_NUMBERS = {"norm_eps": "rms_norm_eps", "init_std": "initializer_range"}

_WINDOW = (
    "attention here sees the whole sequence; set it to null if no sequence is longer than the window, otherwise the "
    "model cannot be imported"
)
# Maps a field of config.json to its allowed values, and to the remedy if it has another. None among the values means
# that the field may be absent or null.
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish", None), "the MLP here is SwiGLU, so this model cannot be imported"),
    "attention_dropout": ((0, None), "there is no dropout here; set it to 0.0 to train without dropout"),
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

    Raises:
        ValueError: no family can express the model.
    """
    family = family_of(sizes)
    options: dict[str, Any] = {}
    if family.attention_bias is None:
        options["attention_bias"] = sizes.attention_bias == "all"
    if family.mlp_bias:
        options["mlp_bias"] = sizes.mlp_bias
    if family.no_rope:
        options["no_rope_layers"] = [int(i not in sizes.layers_without_rope) for i in range(sizes.num_layers)]
    if family.window_switch:
        options["use_sliding_window"] = False
    if family.default("sliding_window") is not None:
        options["sliding_window"] = None
    return {
        "architectures": [family.hugging_face_class],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.query_groups,
        "head_dim": sizes.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.seq_length,
        "initializer_range": sizes.init_std,
        "rms_norm_eps": sizes.norm_eps,
        **hf_rotary.written(sizes.rotary_base, sizes.rotary_scaling),
        "attention_dropout": 0.0,
        **options,
        "tie_word_embeddings": tied,
        "use_cache": True,
        # If these fields are absent, transformers assumes ids that depend on the family.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **token_ids,
    }


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """Return the sizes of the model that config.json describes.

    Fields that do not change the function which the model computes are ignored.

    Args:
        config: the content of config.json. Its `model_type` is a key of
            :data:`megamult.models.llama.families.FAMILIES`.

    Raises:
        ValueError: fields ask for a function that our model cannot compute, or have impossible values. The message
            lists them all.
    """
    family = FAMILIES[config["model_type"]]
    fields = Fields(config, family)
    if config.get("architectures") not in ([family.hugging_face_class], None):
        fields.wrong("architectures", config["architectures"], f"import a {family.hugging_face_class}")
    for name, (allowed, remedy) in _MUST_BE.items():
        if config.get(name) not in allowed:
            fields.mistakes.append(f"{name} is {config.get(name)!r}, not {allowed[0]!r}: {remedy}")
    sizes: dict[str, Any] = {ours: fields.integer(theirs) for ours, theirs in _SIZES.items()}
    numbers: dict[str, Any] = {ours: fields.number(theirs) for ours, theirs in _NUMBERS.items()}
    _check_window(fields, sizes["num_layers"])
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    groups = fields.integer("num_key_value_heads", heads)
    if config.get("num_key_value_heads", groups) is None:
        groups = heads  # null means this in every family
    head = fields.integer("head_dim", hidden // heads or 1)
    given = fields.get("head_dim") is not None
    if head % 2 or not (given or hidden % heads == 0):
        fields.mistakes.append(
            f"head_dim is {head} with num_attention_heads {heads} and hidden_size {hidden}: megamult needs an even "
            "head_dim, and without the field hidden_size must be a multiple of num_attention_heads; so this model "
            "cannot be imported"
        )
    if heads % groups:
        fields.wrong("num_key_value_heads", groups, f"it must divide num_attention_heads ({heads}); correct it")
    base, scaling = hf_rotary.read(fields)
    attention_bias: AttentionBias = "all" if family.attention_bias is None and fields.flag("attention_bias") else "none"
    found: dict[str, Any] = {
        "head_dim": None if head * heads == hidden else head,
        "num_query_groups": groups,
        "rotary_base": base,
        "rotary_scaling": scaling,
        "no_rope_layers": _layers_without_rope(fields, sizes["num_layers"]) if family.no_rope else None,
        "attention_bias": family.attention_bias or attention_bias,
        "mlp_bias": family.mlp_bias and fields.flag("mlp_bias"),
        "qk_norm": family.qk_norm,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }
    fields.check()
    return ModelConfig(**sizes, **numbers, **found)


def _check_window(fields: Fields, layers: int) -> None:
    """Note a mistake if a layer's attention sees only a window."""
    kinds = fields.config.get("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        fields.mistakes.append(f"layer_types is {kinds!r}: megamult has only full attention; {_WINDOW}")
    # In a configuration with the field, null says that there is no window, whatever the family's default.
    window = fields.config.get("sliding_window", fields.family.default("sliding_window"))
    if window is None or (fields.family.window_switch and not fields.flag("use_sliding_window")):
        return
    if fields.family.window_switch and (kinds is not None or _none_slides(fields, layers)):
        return
    fields.wrong("sliding_window", window, _WINDOW)


def _none_slides(fields: Fields, layers: int) -> bool:
    """Return whether no layer has a window although a window is switched on."""
    if fields.family.no_rope:  # only the layers without rotary positions have one
        return not _layers_without_rope(fields, layers)
    return fields.integer("max_window_layers") >= layers


def _layers_without_rope(fields: Fields, layers: int) -> list[int] | None:
    """Return the indices of layers whose entry in `no_rope_layers` is 0; an entry 1 means that a layer *has* rotary
    positions. Without the field, every `no_rope_layer_interval`-th layer has none."""
    listed = fields.config.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval")
        return list(range(interval - 1, layers, interval)) or None
    if not isinstance(listed, list) or len(listed) != layers or any(each not in (0, 1) for each in listed):
        fields.wrong("no_rope_layers", listed, f"it must have a 0 or a 1 for each of the {layers} layers; correct it")
        return None
    return [i for i, has_rope in enumerate(listed) if not has_rope] or None
