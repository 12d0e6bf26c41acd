"""Specs of a decoder's fused parameters and of its head, and standard deviations of its initial weights."""

from __future__ import annotations

import math

from megatron.core.transformer import TransformerConfig

from megamult.models.common.config import DecoderConfig
from megamult.models.common.vocabulary import padded_vocab_size
from megamult.parameters import megatron
from megamult.parameters.spec import ParameterSpec, Role


def qkv(config: TransformerConfig) -> ParameterSpec:
    """Return the spec of the parameter that stores Q, K and V. Its rows are [q ... q k v] for each query group."""
    return megatron.fused_qkv(
        config.num_attention_heads, config.num_query_groups, config.kv_channels, config.hidden_size
    )


def gate_up(config: TransformerConfig) -> ParameterSpec:
    """Return the spec of the parameter that stores gate and up. Tensor-parallel rank p holds [gate_p; up_p]."""
    return megatron.fused_gate_up(config.ffn_hidden_size, config.hidden_size)


def head(config: TransformerConfig, vocab_size: int) -> ParameterSpec:
    """Return the spec of the LM head. The parameter has the rows of `vocab_size` tokens, and rows of padding."""
    return megatron.vocabulary("head", vocab_size, padded_vocab_size(vocab_size), config.hidden_size)


def standard_deviations(sizes: DecoderConfig) -> dict[Role, float]:
    """Return the standard deviation of initial weights for each role.

    It is `init_std`, divided by the square root of their number for projections into the residual stream, and then
    multiplied by the role's factor in `init_std_factors`.
    """
    std = sizes.init_std
    into_stream = std / math.sqrt(sizes.projections_into_stream)
    roles: tuple[Role, ...] = ("q", "k", "v", "gate", "up", "embedding", "head")
    found = dict.fromkeys(roles, std) | {"attention_out": into_stream, "down": into_stream}
    return {role: value * sizes.init_std_factors.get(role, 1.0) for role, value in found.items()}
