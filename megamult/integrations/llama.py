"""Rules of :func:`megamult.fold` for Hugging Face's Llama, Mistral, Qwen2, Qwen3 and SmolLM3.

The expressions match the ends of names, so a model may be wrapped: they find `model.model.layers.0.mlp.up_proj.weight`
as well as `layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

from megamult.integrations.rules import Rule

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
"""Rules for the parameter names of Hugging Face's LlamaForCausalLM. SmolLM3 and others have these names too. Biases, if
there are any, get the role `norm`, as all vectors without a rule do."""

MISTRAL_RULES = LLAMA_RULES
"""Rules for Hugging Face's MistralForCausalLM, which has the names of Llama."""

QWEN2_RULES: dict[str, Rule] = {**LLAMA_RULES, r"\b[qkv]_proj\.bias$": "bias"}
"""Rules for Hugging Face's Qwen2ForCausalLM, which has biases on Q, K and V."""

QWEN3_RULES: dict[str, Rule] = {
    **LLAMA_RULES,
    r"\bq_norm\.weight$": "q_norm",
    r"\bk_norm\.weight$": "k_norm",
}
"""Rules for Hugging Face's Qwen3ForCausalLM, in which norms normalize the queries and keys of each head."""
