"""Llama: grouped-query attention, RMSNorm and gated MLP, built from Megatron-Core's GPT."""
