"""Configuration of a Llama model, the section `model` of a run.

The options describe the published pre-norm decoders with gated MLP: Llama, Mistral, Qwen2, Qwen3, SmolLM3.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamult.models.common.config import DecoderConfig


@dataclass
class ModelConfig(DecoderConfig):
    """Sizes and constants of a Llama model."""

    architecture: str = "llama"
    """Architecture of the model: llama or falcon_h1. The other keys of this section depend on it."""
