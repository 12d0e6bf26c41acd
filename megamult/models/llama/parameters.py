"""Parameters of Llama: specs of the fused ones and of the head, and standard deviations of initial weights."""

from __future__ import annotations

import math

from megatron.core.transformer import TransformerConfig

from megamult.models.common.vocabulary import padded_vocab_size
from megamult.models.llama.config import ModelConfig
from megamult.parameters import megatron
from megamult.parameters.spec import ParameterSpec, Role


def qkv(config: TransformerConfig) -> ParameterSpec:
    """Describe Q, K and V in one parameter, [q ... q k v] for each query group."""
    return megatron.fused_qkv(
        config.num_attention_heads, config.num_query_groups, config.kv_channels, config.hidden_size
    )


def gate_up(config: TransformerConfig) -> ParameterSpec:
    """Describe the gate and the up projection in one parameter, [gate; up] on each tensor-parallel rank."""
    return megatron.fused_gate_up(config.ffn_hidden_size, config.hidden_size)


def head(config: TransformerConfig, vocab_size: int) -> ParameterSpec:
    """Describe the LM head of `vocab_size` tokens, with the padded vocabulary's rows."""
    return megatron.vocabulary("head", vocab_size, padded_vocab_size(vocab_size), config.hidden_size)


def standard_deviations(sizes: ModelConfig) -> dict[Role, float]:
    """Return standard deviations of initial weights by role; those of projections into the residual stream shrink with
    depth."""
    std = sizes.init_std
    into_stream = std / math.sqrt(2 * sizes.num_layers)
    roles: tuple[Role, ...] = ("q", "k", "v", "gate", "up", "embedding", "head")
    return dict.fromkeys(roles, std) | {"attention_out": into_stream, "down": into_stream}
