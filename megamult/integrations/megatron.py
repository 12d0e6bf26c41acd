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

    proj = megatron.single_matrix("attention_out", hidden, heads * head_dim, 1)
    fc2 = megatron.single_matrix("down", hidden, ffn, 1)
    rules: dict[str, Rule] = {
        r"\blinear_qkv\.weight$": qkv,
        r"\blinear_proj\.weight$": proj,
        r"\blinear_fc1\.weight$": fc1,
        r"\blinear_fc2\.weight$": fc2,
        r"\bword_embeddings\.weight$": vocabulary("embedding"),
        r"\boutput_layer\.weight$": vocabulary("head"),
        r"\bfinal_layernorm\.weight$": "final_norm",
    }
    if config.add_bias_linear or config.add_qkv_bias:
        rules[r"\blinear_qkv\.bias$"] = megatron.bias_of(qkv)
    if config.add_bias_linear:
        rules[r"\blinear_fc1\.bias$"] = megatron.bias_of(fc1)
        rules[r"\blinear_proj\.bias$"] = megatron.bias_of(proj, partial=config.sequence_parallel)
        rules[r"\blinear_fc2\.bias$"] = megatron.bias_of(fc2, partial=config.sequence_parallel)
    if config.qk_layernorm:
        rules[r"\bq_layernorm\.(weight|bias)$"] = lambda parameter: _of_heads("q_norm", parameter)
        rules[r"\bk_layernorm\.(weight|bias)$"] = lambda parameter: _of_heads("k_norm", parameter)
    return rules


def _of_heads(role: Role, parameter: Parameter) -> ParameterSpec:
    """Return the spec of the weight of a norm that each rank applies to its own attention heads.

    The weight is replicated, and its gradients are partial. Megatron does not mark it, so the rule states it.
    """
    return megatron.norm(stored_shape(parameter)[0], True, role)
