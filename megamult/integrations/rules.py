"""What the parameters of other people's models are, by name: rules for :func:`megamult.fold`.

megamult's own modules state the layout of each parameter. Elsewhere only a name says what a parameter is, and a *rule*
says what a name means: a regular expression, and the role or the layout of what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn import Parameter

from megamult.parameters import spec as lo
from megamult.parameters.spec import ParameterSpec, Role

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

Rule = Role | ParameterSpec | Callable[[Parameter], ParameterSpec]
"""What the parameters that an expression finds are: a role, where each is one matrix W[out, in] (or, as `norm`,
whatever AdamW shall train without weight decay and without multipliers); or a layout, or a function that makes one."""

LLAMA_RULES: dict[str, Rule] = {
    r"\bq_proj\.weight$": "q",
    r"\bk_proj\.weight$": "k",
    r"\bv_proj\.weight$": "v",
    r"\bo_proj\.weight$": "attention_out",
    r"\bgate_proj\.weight$": "gate",
    r"\bup_proj\.weight$": "up",
    r"\bdown_proj\.weight$": "down",
    r"\bembed_tokens\.weight$": "embedding",
    r"\blm_head\.weight$": "head",
}
"""Names of Hugging Face's LlamaForCausalLM, and of the many models that keep to them (Mistral, Qwen, ...)."""


def local_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape of this tensor-parallel rank's shard, also where ZeRO 3 has emptied the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def one_tensor(role: Role, parameter: Parameter, tp_size: int) -> ParameterSpec:
    """The layout of a parameter that is one logical tensor; Megatron's attributes say how it is sharded, if it is."""
    shape, tp_dim, stride = list(local_shape(parameter)) or [1], None, 1
    if getattr(parameter, "tensor_model_parallel", False):
        tp_dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
        shape[tp_dim] *= tp_size
    return ParameterSpec(
        {"norm": "norm", "embedding": "embedding", "head": "head"}.get(role, "matrix"),  # type: ignore[arg-type]
        (lo.Part("", role, tuple(shape)),),
        tuple(shape),
        tp_dim,
        (lo.Segment(0, 0, 0, shape[0]),),
        stride=stride,
        partial_over_tp=tp_dim is None and bool(getattr(parameter, "sequence_parallel", False)),
    )


def megatron_rules(config: TransformerConfig, vocab_size: int) -> dict[str, Rule]:
    """Rules for an unmodified Megatron-Core GPTModel, of the local or the Transformer Engine layer spec.

    Learned position embeddings are the model's own choice, not the configuration's: where there are some, add
    ``{r"position_embeddings\\.weight$": "norm"}``.

    Args:
        config: the model's.
        vocab_size: exact number of tokens; further rows of embedding and head are padding.

    Raises:
        ValueError: an architecture whose matrices these rules do not know (mixture of experts, latent attention).
    """
    for key in ("num_moe_experts", "multi_latent_attention", "attention_output_gate", "experimental_attention_variant"):
        if getattr(config, key, None):
            raise ValueError(
                f"{key} is {getattr(config, key)!r}: megatron_rules knows dense models with plain attention; write "
                "rules of your own, with a megamult.parameters.spec.Layout for what is fused"
            )
    hidden, ffn, tp_size = config.hidden_size, config.ffn_hidden_size, config.tensor_model_parallel_size
    heads, head_dim = config.num_attention_heads, config.kv_channels
    qkv = lo.fused_qkv(heads, config.num_query_groups, head_dim, hidden)
    fc1 = lo.fused_gate_up(ffn, hidden) if config.gated_linear_unit else lo.single_matrix("up", ffn, hidden, 0)

    def vocabulary(role: Role) -> Callable[[Parameter], ParameterSpec]:
        def make(parameter: Parameter) -> ParameterSpec:
            padded = local_shape(parameter)[0] * tp_size
            if vocab_size > padded:
                raise ValueError(
                    f"vocab_size is {vocab_size}, and the {role} of the model has {padded} rows: give the exact number "
                    "of tokens, without padding"
                )
            return lo.vocabulary(role, vocab_size, padded, hidden)

        return make

    rules: dict[str, Rule] = {
        r"\blinear_qkv\.weight$": qkv,
        r"\blinear_proj\.weight$": lo.single_matrix("attention_out", hidden, heads * head_dim, 1),
        r"\blinear_fc1\.weight$": fc1,
        r"\blinear_fc2\.weight$": lo.single_matrix("down", hidden, ffn, 1),
        r"\bword_embeddings\.weight$": vocabulary("embedding"),
        r"\boutput_layer\.weight$": vocabulary("head"),
    }
    if config.add_bias_linear or config.add_qkv_bias:
        rules[r"\blinear_qkv\.bias$"] = _bias(qkv)
    if config.add_bias_linear:
        rules[r"\blinear_fc1\.bias$"] = _bias(fc1)
    if config.qk_layernorm:
        # Every rank has the same weights and applies them to its own heads; Megatron does not mark them.
        rules[r"\b[qk]_layernorm\.(weight|bias)$"] = lambda parameter: lo.norm(local_shape(parameter)[0], True)
    return rules


def _bias(weight: ParameterSpec) -> ParameterSpec:
    """Of the bias that lies beside the rows of a matrix: not scaled, sharded and fused as they are."""
    parts = tuple(lo.Part(part.name, "norm", part.shape[:1]) for part in weight.parts)
    return replace(weight, kind="norm", parts=parts, shape=weight.shape[:1])
