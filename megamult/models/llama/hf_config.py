"""Conversion between our ModelConfig and the config.json of Hugging Face's families.

If a config.json describes a function that our model cannot compute, the conversion raises a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamult.models.common import hf_config
from megamult.models.common.config import AttentionBias
from megamult.models.common.hf_fields import Fields
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.families import FAMILIES, Family, family_of

_WINDOW = (
    "attention here sees the whole sequence; set it to null if no sequence is longer than the window, otherwise the "
    "model cannot be imported"
)


def to_hugging_face(
    sizes: ModelConfig,
    vocab_size: int,
    *,
    tied: bool,
    dtype: str,
    token_ids: Mapping[str, Any],
    embedding_factor: float = 1.0,
) -> dict[str, Any]:
    """Return the content of config.json for an exported model.

    :class:`megamult.models.common.architecture.ToHuggingFace` describes the arguments. `embedding_factor` must be 1.

    Raises:
        ValueError: no family can express the model.
    """
    assert embedding_factor == 1.0
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
    if family.defaults.get("sliding_window") is not None:
        options["sliding_window"] = None
    described = hf_config.written(
        sizes,
        vocab_size,
        family.model_type,
        family.hugging_face_class,
        tied=tied,
        dtype=dtype,
        token_ids=token_ids,
    )
    return described | options


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
    fields = Fields(config, family.defaults)
    common = hf_config.read(fields, family.hugging_face_class, {})
    layers = common["num_layers"]
    _check_window(fields, family, layers)
    attention_bias: AttentionBias = "all" if family.attention_bias is None and fields.flag("attention_bias") else "none"
    found: dict[str, Any] = {
        "no_rope_layers": _layers_without_rope(fields, layers) if family.no_rope else None,
        "attention_bias": family.attention_bias or attention_bias,
        "mlp_bias": family.mlp_bias and fields.flag("mlp_bias"),
        "qk_norm": family.qk_norm,
    }
    fields.check()
    return ModelConfig(**common, **found)


def _check_window(fields: Fields, family: Family, layers: int) -> None:
    """Note a mistake if a layer's attention sees only a window."""
    kinds = fields.config.get("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        fields.mistakes.append(f"layer_types is {kinds!r}: megamult has only full attention; {_WINDOW}")
    # In a configuration with the field, null says that there is no window, whatever the family's default.
    window = fields.config.get("sliding_window", family.defaults.get("sliding_window"))
    if window is None or (family.window_switch and not fields.flag("use_sliding_window")):
        return
    if family.window_switch and (kinds is not None or _none_slides(fields, family, layers)):
        return
    fields.wrong("sliding_window", window, _WINDOW)


def _none_slides(fields: Fields, family: Family, layers: int) -> bool:
    """Return whether no layer has a window although a window is switched on."""
    if family.no_rope:  # only the layers without rotary positions have one
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
