"""Rules of :func:`megamult.fold` for Hugging Face's Llama and models with the same parameter names."""

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
"""Rules for the parameter names of Hugging Face's LlamaForCausalLM. Mistral, Qwen and others have these names too."""
