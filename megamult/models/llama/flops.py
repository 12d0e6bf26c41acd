"""Number of floating-point operations of a Llama model."""

from __future__ import annotations

from megamult.models.llama.config import ModelConfig


def flops_per_token(sizes: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs per token of forward and backward, without those of recomputation.

    These are 6 FLOPs for each weight in a matrix product, and the FLOPs of attention's two products, q k^T and p v. In
    these products only half of the sequence counts, because attention is causal. The FLOPs of biases and norms are not
    counted.
    """
    h, f, layers = sizes.hidden_size, sizes.ffn_hidden_size, sizes.num_layers
    q, kv = sizes.head_size * sizes.num_attention_heads, sizes.head_size * sizes.query_groups
    weights = layers * (2 * h * q + 2 * h * kv + 3 * h * f) + h * vocab_size
    attention = layers * q * sizes.seq_length  # half of forward's FLOPs: q k^T and p v take 2 x 2 x seq/2 x q
    return 6.0 * weights + 3 * 2.0 * attention
