"""Floating-point operations of the model."""

from __future__ import annotations

from megamult.models.llama.config import ModelConfig


def flops_per_token(sizes: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of forward and backward per token: 6 per weight in a matrix product, and those of attention's
    two products over the causal half of the sequence (recomputation not counted)."""
    h, f, layers = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_layers
    kv = h // sizes.num_attention_heads * sizes.query_groups
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * f) + h * vocab_size
    attention = layers * h * sizes.seq_length  # q k^T and p v: 2 x 2 FLOP x seq/2 x hidden, forward
    return 6.0 * weights + 3 * 2.0 * attention
