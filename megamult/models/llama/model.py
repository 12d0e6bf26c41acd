"""Llama on Megatron-Core's GPTModel."""

from __future__ import annotations

from megamult.models.common.decoder import Decoder


class GPT(Decoder):
    """A Llama model: attention and a gated MLP in every layer. Arguments and losses are those of the decoder."""
