"""Number of floating-point operations of a Falcon-H1 model."""

from __future__ import annotations

from megamult.models.falcon_h1.config import FalconH1Config


def flops_per_token(sizes: FalconH1Config, vocab_size: int) -> float:
    """Return the FLOPs per token of forward and backward, without those of recomputation.

    These are 6 FLOPs for each weight in a matrix product or a convolution, three times forward's FLOPs of attention's
    two products, of which half of the sequence counts because attention is causal, and three times those of the
    recurrence: per head 2 head_dim state each to decay the state, to add to it and to read it. Computing by chunks
    takes more.
    """
    hidden, mixer = sizes.hidden_size, sizes.mixer
    q, kv = sizes.head_size * sizes.num_attention_heads, sizes.head_size * sizes.query_groups
    attention, mixers, mlps = len(sizes.attention_layers), len(sizes.mixer_layers), len(sizes.mlp_layers)
    weights = (
        attention * hidden * 2 * (q + kv)
        + mlps * 3 * hidden * sizes.ffn_hidden_size
        + mixers * (hidden * (sum(mixer.rows) + mixer.inner) + mixer.kernel * (mixer.inner + 2 * mixer.shared))
        + hidden * vocab_size
    )
    forward = attention * 2 * q * sizes.seq_length + mixers * 6 * mixer.inner * mixer.state
    return 6.0 * weights + 3.0 * forward
