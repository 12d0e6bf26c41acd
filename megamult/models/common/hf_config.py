"""Fields of config.json that the classes of all our decoders have, and their conversion from and to our keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.models.common import hf_rotary
from megamult.models.common.config import DecoderConfig
from megamult.models.common.hf_fields import Fields

# Maps a field of DecoderConfig to Hugging Face's field.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "seq_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_NUMBERS = {"norm_eps": "rms_norm_eps", "init_std": "initializer_range"}

MustBe = Mapping[str, tuple[tuple[Any, ...], str]]
"""Maps a field of config.json to its allowed values, and to the remedy if it has another. None among the values means
that the field may be absent or null."""

_MUST_BE: MustBe = {
    "hidden_act": (("silu", "swish", None), "the MLP here is SwiGLU, so this model cannot be imported"),
    "attention_dropout": ((0, None), "there is no dropout here; set it to 0.0 to train without dropout"),
    "quantization_config": ((None,), "weights here are not quantized; dequantize and save the model first"),
    "partial_rotary_factor": ((1, None), "a head is rotated as a whole here, so this model cannot be imported"),
}


def written(
    sizes: DecoderConfig,
    vocab_size: int,
    model_type: str,
    hugging_face_class: str,
    *,
    tied: bool,
    dtype: str,
    token_ids: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of an exported model's config.json that all classes have.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
        model_type: value of `model_type`.
        hugging_face_class: name of the model's class in transformers.
        tied: whether the exported model has one tensor for embedding and head.
        dtype: dtype of the weights, a key of :data:`megamult.models.common.hugging_face.DTYPES`.
        token_ids: ids of the tokenizer's special tokens, by their keys in config.json such as `bos_token_id`.
    """
    return {
        "architectures": [hugging_face_class],
        "model_type": model_type,
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
        "tie_word_embeddings": tied,
        "use_cache": True,
        # If these fields are absent, transformers assumes ids that depend on the class.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **token_ids,
    }


def read(fields: Fields, hugging_face_class: str, must_be: MustBe) -> dict[str, Any]:
    """Return the keys of :class:`DecoderConfig` that all classes have in config.json, and note all mistakes.

    Args:
        fields: fields of the config.json.
        hugging_face_class: name of the model's class in transformers.
        must_be: fields that must have certain values in this class, beside those that must in all classes.
    """
    config = fields.config
    if config.get("architectures") not in ([hugging_face_class], None):
        fields.wrong("architectures", config["architectures"], f"import a {hugging_face_class}")
    for name, (allowed, remedy) in {**_MUST_BE, **must_be}.items():
        if config.get(name) not in allowed:
            fields.mistakes.append(f"{name} is {config.get(name)!r}, not {allowed[0]!r}: {remedy}")
    sizes: dict[str, Any] = {ours: fields.integer(theirs) for ours, theirs in _SIZES.items()}
    numbers: dict[str, Any] = {ours: fields.number(theirs) for ours, theirs in _NUMBERS.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    groups = fields.integer("num_key_value_heads", heads)
    if config.get("num_key_value_heads", groups) is None:
        groups = heads  # null means this in every class
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
    return {
        **sizes,
        **numbers,
        "head_dim": None if head * heads == hidden else head,
        "num_query_groups": groups,
        "rotary_base": base,
        "rotary_scaling": scaling,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }
