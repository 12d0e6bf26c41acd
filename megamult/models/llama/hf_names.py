"""Every weight of a model: its logical name here, its name in Hugging Face's LlamaForCausalLM, its role, its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megamult.models.llama.config import ModelConfig
from megamult.multipliers.merge import LEAVES
from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role, Side


@dataclass(frozen=True)
class Weight:
    """One logical tensor W[rows, cols], or a norm's vector."""

    logical: str
    hugging_face: str
    role: Role
    shape: tuple[int, ...]

    def multiplier(self, side: Side) -> tuple[str, tuple[int, ...]]:
        """Logical name and shape of its multipliers on one side, whether it has any or not."""
        length = {"row": self.shape[0], "col": self.shape[-1], "scalar": 1}[side]
        return f"{self.logical.rpartition('.')[0]}.{LEAVES[side]}", (length,)

    def multipliers(self, placement: Placement) -> dict[str, tuple[int, ...]]:
        """Name and shape of the multipliers that a placement gives it."""
        sides = placement.get(self.role, frozenset[Side]())
        return dict(self.multiplier(side) for side in LEAVES if side in sides)


def weights(model: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    """Every weight, in Hugging Face's order; the head also where it is tied to the embedding.

    A matrix W[out, in] is the same here and there: both multiply x W^T, have the heads in order and rotate the halves
    of a head, so nothing is transposed or permuted.

    Args:
        model: sizes.
        vocab_size: exact, without padding.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    kv = hidden // model.num_attention_heads * model.query_groups
    yield Weight("embedding.word_embeddings.weight", "model.embed_tokens.weight", "embedding", (vocab_size, hidden))
    layer: tuple[tuple[str, str, Role, tuple[int, ...]], ...] = (
        ("input_layernorm", "input_layernorm", "norm", (hidden,)),
        ("self_attention.linear_qkv.q", "self_attn.q_proj", "q", (hidden, hidden)),
        ("self_attention.linear_qkv.k", "self_attn.k_proj", "k", (kv, hidden)),
        ("self_attention.linear_qkv.v", "self_attn.v_proj", "v", (kv, hidden)),
        ("self_attention.linear_proj", "self_attn.o_proj", "attention_out", (hidden, hidden)),
        ("pre_mlp_layernorm", "post_attention_layernorm", "norm", (hidden,)),
        ("mlp.linear_fc1.gate", "mlp.gate_proj", "gate", (ffn, hidden)),
        ("mlp.linear_fc1.up", "mlp.up_proj", "up", (ffn, hidden)),
        ("mlp.linear_fc2", "mlp.down_proj", "down", (hidden, ffn)),
    )
    for i in range(model.num_layers):
        for logical, theirs, role, shape in layer:
            yield Weight(f"decoder.layers.{i}.{logical}.weight", f"model.layers.{i}.{theirs}.weight", role, shape)
    yield Weight("decoder.final_layernorm.weight", "model.norm.weight", "norm", (hidden,))
    yield Weight("output_layer.weight", "lm_head.weight", "head", (vocab_size, hidden))
