"""Llama's entry in the table of architectures, by which the rest of the package uses Llama."""

from __future__ import annotations

from collections.abc import Mapping

from megamult.models.common.architecture import Architecture, ModelClass
from megamult.models.llama.activation_memory import activation_memory
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.families import FAMILIES
from megamult.models.llama.flops import flops_per_token
from megamult.models.llama.hf_config import from_hugging_face, to_hugging_face
from megamult.models.llama.hf_names import weights


def _model() -> ModelClass[ModelConfig]:
    from megamult.models.llama.model import GPT

    return GPT


def _standard_deviations(sizes: ModelConfig) -> Mapping[str, float]:
    from megamult.models.common.parameters import standard_deviations  # needs Megatron

    return standard_deviations(sizes)


LLAMA = Architecture(
    name="llama",
    hugging_face_classes={name: family.hugging_face_class for name, family in FAMILIES.items()},
    sizes=ModelConfig,
    model=_model,
    flops_per_token=flops_per_token,
    activation_memory=activation_memory,
    weights=weights,
    standard_deviations=_standard_deviations,
    to_hugging_face=to_hugging_face,
    from_hugging_face=from_hugging_face,
)
