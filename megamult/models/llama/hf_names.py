"""List of a Llama model's weights: logical name, name in Hugging Face's classes, role and shape of each."""

from __future__ import annotations

from collections.abc import Iterator

from megamult.models.common import hf_names
from megamult.models.common.hugging_face import Weight
from megamult.models.llama.config import ModelConfig


def weights(sizes: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    """Yield all weights in Hugging Face's order; the last is the head, even if it is tied to the embedding.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
    """
    yield hf_names.embedding(sizes, vocab_size)
    for i in range(sizes.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        yield hf_names.norm(sizes, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        yield from hf_names.attention(sizes, f"{ours}.self_attention", f"{theirs}.self_attn")
        yield hf_names.norm(sizes, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
        yield from hf_names.mlp(sizes, f"{ours}.mlp", f"{theirs}.mlp")
    yield from hf_names.ending(sizes, vocab_size, "model.norm")
