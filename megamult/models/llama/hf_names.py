"""List of a Llama model's weights: logical name, name in Hugging Face's classes, role and shape of each."""

from __future__ import annotations

from collections.abc import Iterator

from megamult.models.common.hugging_face import Weight
from megamult.models.llama.config import ModelConfig
from megamult.parameters.spec import Role


def weights(sizes: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    """Yield all weights in Hugging Face's order; the last is the head, even if it is tied to the embedding.

    A matrix W[out, in] is the same here and in Hugging Face, without transposition or permutation. Both compute x W^T,
    have the heads in the same order, and apply the rotary embedding to the two halves of a head.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
    """
    hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
    head = sizes.head_size
    q, kv = head * sizes.num_attention_heads, head * sizes.query_groups
    biased: dict[str, bool] = dict.fromkeys(("gate", "up", "down"), sizes.mlp_bias)
    biased |= dict.fromkeys(("q", "k", "v"), sizes.attention_bias != "none")
    biased["attention_out"] = sizes.attention_bias == "all"
    yield Weight("embedding.word_embeddings.weight", "model.embed_tokens.weight", "embedding", (vocab_size, hidden))
    layer: list[tuple[str, str, Role, tuple[int, ...]]] = [
        ("input_layernorm", "input_layernorm", "norm", (hidden,)),
        ("self_attention.linear_qkv.q", "self_attn.q_proj", "q", (q, hidden)),
        ("self_attention.linear_qkv.k", "self_attn.k_proj", "k", (kv, hidden)),
        ("self_attention.linear_qkv.v", "self_attn.v_proj", "v", (kv, hidden)),
        ("self_attention.linear_proj", "self_attn.o_proj", "attention_out", (hidden, q)),
        ("pre_mlp_layernorm", "post_attention_layernorm", "norm", (hidden,)),
        ("mlp.linear_fc1.gate", "mlp.gate_proj", "gate", (ffn, hidden)),
        ("mlp.linear_fc1.up", "mlp.up_proj", "up", (ffn, hidden)),
        ("mlp.linear_fc2", "mlp.down_proj", "down", (hidden, ffn)),
    ]
    if sizes.qk_norm:
        layer += [
            ("self_attention.q_layernorm", "self_attn.q_norm", "q_norm", (head,)),
            ("self_attention.k_layernorm", "self_attn.k_norm", "k_norm", (head,)),
        ]
    for i in range(sizes.num_layers):
        for logical, theirs, role, shape in layer:
            name, their_name = f"decoder.layers.{i}.{logical}.weight", f"model.layers.{i}.{theirs}.weight"
            yield Weight(name, their_name, role, shape, sizes.norms if role == "norm" else "vector")
            if biased.get(role):
                yield Weight(_bias(name), _bias(their_name), "bias", shape[:1])
    yield Weight("decoder.final_layernorm.weight", "model.norm.weight", "final_norm", (hidden,), sizes.final_norm)
    yield Weight("output_layer.weight", "lm_head.weight", "head", (vocab_size, hidden))


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
