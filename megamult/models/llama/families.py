"""Table of the model families of Hugging Face whose functions our Llama model computes, and what each can express.

A family is a class of transformers with a configuration of its own. The families differ in their options, in the
fields of config.json that set these, and in the values that transformers assumes for absent fields. An option that a
family's class does not read has no effect there, whatever config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megamult.models.common.config import AttentionBias
from megamult.models.llama.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One family: its names, its options, and its defaults."""

    model_type: str
    """Value of `model_type` in config.json."""
    hugging_face_class: str
    """Name of the model's class in transformers."""
    attention_bias: AttentionBias | None
    """Biases of attention that every model of the family has. None: the field `attention_bias` says whether all four
    projections have one."""
    mlp_bias: bool = False
    """Whether the field `mlp_bias` says whether the MLP has biases. If not, it has none."""
    qk_norm: bool = False
    """Whether every model of the family has QK-norm. If not, none has."""
    no_rope: bool = False
    """Whether the field `no_rope_layers` says which layers have no rotary positions. If not, all have them."""
    window_switch: bool = False
    """Whether `sliding_window` has an effect only if `use_sliding_window` is true."""
    any_head_dim: bool = True
    """Whether hidden_size may be no multiple of num_attention_heads."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers assumes for fields that are absent, where they are not
    :data:`megamult.models.common.hf_fields.COMMON_DEFAULTS`. A default of None means that the value follows from
    other fields."""

    def lacking(self, sizes: ModelConfig) -> list[str]:
        """Return the keys of `sizes`, with their values, that no model of this family can have."""
        biases: set[str] = {"none", "all"} if self.attention_bias is None else {self.attention_bias}
        wrong = {
            "attention_bias": sizes.attention_bias not in biases,
            "mlp_bias": sizes.mlp_bias and not self.mlp_bias,
            "qk_norm": sizes.qk_norm != self.qk_norm,
            "no_rope_layers": bool(sizes.no_rope_layers) and not self.no_rope,
            "hidden_size": bool(sizes.hidden_size % sizes.num_attention_heads) and not self.any_head_dim,
        }
        return [f"model.{key} {getattr(sizes, key)!r}" for key, found in wrong.items() if found]


FAMILIES: dict[str, Family] = {
    each.model_type: each
    for each in (
        Family(
            "llama",
            "LlamaForCausalLM",
            None,
            mlp_bias=True,
            any_head_dim=False,
            defaults={
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "max_position_embeddings": 2048,
            },
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            "none",
            defaults={
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "qkv",
            window_switch=True,
            defaults={
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 22016,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            None,
            qk_norm=True,
            window_switch=True,
            defaults={
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 22016,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            None,
            mlp_bias=True,
            no_rope=True,
            window_switch=True,
            defaults={
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
                "no_rope_layer_interval": 4,
            },
        ),
    )
}
"""Families by `model_type`. An export takes the first that can express the model."""


def family_of(sizes: ModelConfig) -> Family:
    """Return the first family that can express a model.

    Raises:
        ValueError: none can. The message names, for each family, the keys that it cannot express.
    """
    lacking = {name: family.lacking(sizes) for name, family in FAMILIES.items()}
    for name, keys in lacking.items():
        if not keys:
            return FAMILIES[name]
    listed = "; ".join(f"{name} has no {' and no '.join(keys)}" for name, keys in lacking.items())
    raise ValueError(
        f"no family of Hugging Face models has this combination of options ({listed}): it can be trained but not "
        "exported; change one of these keys before training"
    )
