"""What the processes of test_fold.py do: fold unmodified Megatron-Core models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamult.parameters.spec import ParameterSpec

VOCAB, PADDED, SEQ, BATCH = 200, 256, 16, 4
SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 60,
}
LLAMA_LIKE = {"gated_linear_unit": True, "normalization": "RMSNorm", "add_bias_linear": False}
GPT2_LIKE = {"gated_linear_unit": False, "normalization": "LayerNorm", "add_bias_linear": True, "qk_layernorm": True}
GATED_WITH_BIAS = LLAMA_LIKE | {"add_bias_linear": True}


def build(tensor: int, style: dict[str, Any], **gpt: Any) -> tuple[Any, Any]:
    """Megatron's configuration and model; its groups are set up."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megamult.distributed import start

    start.initialize(tensor)
    torch.manual_seed(1)
    config = TransformerConfig(
        **SIZES,
        **style,
        tensor_model_parallel_size=tensor,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        activation_func=torch.nn.functional.silu,
    )
    spec = get_gpt_layer_local_spec(normalization=style["normalization"], qk_layernorm=style.get("qk_layernorm", False))
    settings = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False} | gpt
    return config, GPTModel(config, spec, vocab_size=PADDED, max_sequence_length=SEQ, **settings)


def layouts_of_both(tensor: int) -> tuple[dict[str, ParameterSpec], dict[str, ParameterSpec]]:
    """By name, of an unmodified GPTModel by its rules, and of megamult's own GPT of the same sizes and options."""
    import megamult
    from megamult.models.llama.config import ModelConfig
    from megamult.models.llama.model import GPT
    from megamult.parameters.stated import named_specs

    config, model = build(tensor, GATED_WITH_BIAS | {"qk_layernorm": True, "kv_channels": 10})
    megamult.fold({}, model, megamult.megatron_rules(config, VOCAB))
    options: dict[str, Any] = {"head_dim": 10, "attention_bias": "all", "mlp_bias": True, "qk_norm": True}
    sizes = ModelConfig(**SIZES, **options, seq_length=SEQ)
    own = GPT(sizes, VOCAB, seed=1, placement={}, tensor_parallel=tensor)
    by_rules, stated = ({name: spec for name, _, spec in named_specs(each)} for each in (model, own))
    return by_rules, stated


def train(tensor: int, style: dict[str, Any], steps: int, **gpt: Any) -> tuple[list[float], Tensor]:
    """Losses of a few steps on one batch without DeepSpeed, and the multipliers after them."""
    import megamult

    config, model = build(tensor, style, **gpt)
    rules = megamult.megatron_rules(config, VOCAB)
    if gpt.get("position_embedding_type") == "learned_absolute":
        rules[r"position_embeddings\.weight$"] = "norm"
    optimizer = megamult.fold(
        {"lr": 1e-2, "adamw": {"eps": 1e-4}, "clip_grad_norm": 0.5},
        model,
        rules,
        initial=lambda role, side: 0.8 if role == "q" else 1.1,
    )
    optimizer.begin()
    text = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(SEQ).expand(BATCH, -1)
    future = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    losses = []
    for _ in range(steps):
        loss = model(text[:, :-1], positions, future, labels=text[:, 1:].contiguous()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert optimizer.folded is not None
    return losses, optimizer.folded.values.detach()


def errors(tensor: int) -> dict[str, str]:
    """Messages, by what is wrong; empty where nothing was."""
    import megamult

    def message(function: Any) -> str:
        try:
            function()
        except ValueError as error:
            return str(error)
        return ""

    config, tied = build(tensor, LLAMA_LIKE, share_embeddings_and_output_weights=True)
    rules = megamult.megatron_rules(config, VOCAB)
    without = {"q": "row", "down": ["row", "col"]}
    found = {
        "tied": message(lambda: megamult.fold({}, tied, rules)),
        "tied, embedding left out": message(lambda: megamult.fold({}, tied, rules, placement=without)),
        # Folded before, so its parameters state their layouts: still tied.
        "tied, no rules": message(lambda: megamult.fold({}, tied, {})),
        "vocabulary": message(lambda: megamult.fold({}, tied, megamult.megatron_rules(config, PADDED + 1))),
    }
    config.num_moe_experts = 2
    return found | {"experts": message(lambda: megamult.megatron_rules(config, VOCAB))}
