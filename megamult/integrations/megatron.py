"""Rules of :func:`megamult.fold` for Megatron-Core's own models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.nn import Parameter

from megamult.integrations.rules import Rule
from megamult.parameters import megatron
from megamult.parameters.spec import ParameterSpec, Role
from megamult.parameters.stated import stored_shape

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def megatron_rules(config: TransformerConfig, vocab_size: int) -> dict[str, Rule]:
    """Return rules for Megatron-Core's GPTModel, with the local or the Transformer Engine layer spec.

    The configuration does not say whether the model has learned position embeddings. If it has, add
    ``{r"position_embeddings\\.weight$": "norm"}``.

    Args:
        config: configuration of the model.
        vocab_size: exact number of tokens. Further rows of embedding and head are padding.

    Raises:
        ValueError: the architecture has matrices that these rules do not know (mixture of experts, latent attention).
    """
    for key in ("num_moe_experts", "multi_latent_attention", "attention_output_gate", "experimental_attention_variant"):
        if getattr(config, key, None):
            raise ValueError(
                f"{key} is {getattr(config, key)!r}: megatron_rules knows dense models with plain attention; write "
                "rules of your own, with a ParameterSpec for each fused parameter"
            )
    hidden, ffn, tp_size = config.hidden_size, config.ffn_hidden_size, config.tensor_model_parallel_size
    heads, head_dim = config.num_attention_heads, config.kv_channels
    qkv = megatron.fused_qkv(heads, config.num_query_groups, head_dim, hidden)
    fc1 = (
        megatron.fused_gate_up(ffn, hidden)
        if config.gated_linear_unit
        else megatron.single_matrix("up", ffn, hidden, 0)
    )

    def vocabulary(role: Role) -> Callable[[Parameter], ParameterSpec]:
        def make(parameter: Parameter) -> ParameterSpec:
            padded = stored_shape(parameter)[0] * tp_size
            if vocab_size > padded:
                raise ValueError(
                    f"vocab_size is {vocab_size}, but the {role} of the model has only {padded} rows, padding "
                    "included: give the exact number of tokens, without padding"
                )
            return megatron.vocabulary(role, vocab_size, padded, hidden)

        return make

    rules: dict[str, Rule] = {
        r"\blinear_qkv\.weight$": qkv,
        r"\blinear_proj\.weight$": megatron.single_matrix("attention_out", hidden, heads * head_dim, 1),
        r"\blinear_fc1\.weight$": fc1,
        r"\blinear_fc2\.weight$": megatron.single_matrix("down", hidden, ffn, 1),
        r"\bword_embeddings\.weight$": vocabulary("embedding"),
        r"\boutput_layer\.weight$": vocabulary("head"),
        r"\bfinal_layernorm\.weight$": "final_norm",
    }
    if config.add_bias_linear or config.add_qkv_bias:
        rules[r"\blinear_qkv\.bias$"] = megatron.bias_of(qkv)
    if config.add_bias_linear:
        rules[r"\blinear_fc1\.bias$"] = megatron.bias_of(fc1)
    if config.qk_layernorm:
        # These weights are replicated, and each rank applies them to its own heads, so their gradients are partial.
        # Megatron does not mark these weights, so the rule states it.
        rules[r"\b[qk]_layernorm\.(weight|bias)$"] = lambda parameter: megatron.norm(stored_shape(parameter)[0], True)
    return rules
