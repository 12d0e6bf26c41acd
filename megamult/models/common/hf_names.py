"""Weights of the blocks that all decoders have, with their logical names and their names in Hugging Face's classes.

A matrix W[out, in] is the same here and in Hugging Face, without transposition or permutation. Both compute x W^T, have
the heads in the same order, and apply the rotary embedding to the two halves of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

from megamult.models.common.config import DecoderConfig
from megamult.models.common.hugging_face import Weight
from megamult.parameters.spec import Role


def embedding(sizes: DecoderConfig, vocab_size: int) -> Weight:
    """Return the embedding. `vocab_size` is exact, without padding."""
    shape = vocab_size, sizes.hidden_size
    return Weight("embedding.word_embeddings.weight", "model.embed_tokens.weight", "embedding", shape)


def norm(sizes: DecoderConfig, ours: str, theirs: str) -> Weight:
    """Return the weight of a layer's norm. `ours` and `theirs` are the names of the norm."""
    return Weight(f"{ours}.weight", f"{theirs}.weight", "norm", (sizes.hidden_size,), sizes.norms)


def attention(sizes: DecoderConfig, ours: str, theirs: str) -> Iterator[Weight]:
    """Yield the weights of attention. `ours` and `theirs` are the names of the module."""
    hidden, head = sizes.hidden_size, sizes.head_size
    q, kv = head * sizes.num_attention_heads, head * sizes.query_groups
    into, out = sizes.attention_bias != "none", sizes.attention_bias == "all"
    yield from _linear(f"{ours}.linear_qkv.q", f"{theirs}.q_proj", "q", (q, hidden), into)
    yield from _linear(f"{ours}.linear_qkv.k", f"{theirs}.k_proj", "k", (kv, hidden), into)
    yield from _linear(f"{ours}.linear_qkv.v", f"{theirs}.v_proj", "v", (kv, hidden), into)
    yield from _linear(f"{ours}.linear_proj", f"{theirs}.o_proj", "attention_out", (hidden, q), out)
    if sizes.qk_norm:
        yield Weight(f"{ours}.q_layernorm.weight", f"{theirs}.q_norm.weight", "q_norm", (head,))
        yield Weight(f"{ours}.k_layernorm.weight", f"{theirs}.k_norm.weight", "k_norm", (head,))


def mlp(sizes: DecoderConfig, ours: str, theirs: str) -> Iterator[Weight]:
    """Yield the weights of the gated MLP. `ours` and `theirs` are the names of the module."""
    hidden, ffn, biased = sizes.hidden_size, sizes.ffn_hidden_size, sizes.mlp_bias
    yield from _linear(f"{ours}.linear_fc1.gate", f"{theirs}.gate_proj", "gate", (ffn, hidden), biased)
    yield from _linear(f"{ours}.linear_fc1.up", f"{theirs}.up_proj", "up", (ffn, hidden), biased)
    yield from _linear(f"{ours}.linear_fc2", f"{theirs}.down_proj", "down", (hidden, ffn), biased)


def ending(sizes: DecoderConfig, vocab_size: int, final_norm: str) -> Iterator[Weight]:
    """Yield the final norm, whose name in Hugging Face's class is given, and the head."""
    hidden = sizes.hidden_size
    yield Weight("decoder.final_layernorm.weight", f"{final_norm}.weight", "final_norm", (hidden,), sizes.final_norm)
    yield Weight("output_layer.weight", "lm_head.weight", "head", (vocab_size, hidden))


def _linear(ours: str, theirs: str, role: Role, shape: tuple[int, int], biased: bool) -> Iterator[Weight]:
    yield Weight(f"{ours}.weight", f"{theirs}.weight", role, shape)
    if biased:
        yield Weight(f"{ours}.bias", f"{theirs}.bias", "bias", shape[:1])
