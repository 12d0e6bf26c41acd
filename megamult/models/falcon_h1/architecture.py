"""Falcon-H1's entry in the table of architectures, by which the rest of the package uses Falcon-H1."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megamult.distributed import device
from megamult.models.common.architecture import Architecture, ModelClass
from megamult.models.common.mamba2 import scan
from megamult.models.falcon_h1.activation_memory import activation_memory
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.falcon_h1.flops import flops_per_token
from megamult.models.falcon_h1.hf_config import (
    HUGGING_FACE_CLASS,
    MODEL_TYPE,
    forward_multipliers,
    from_hugging_face,
    to_hugging_face,
)
from megamult.models.falcon_h1.hf_names import weights


def _model() -> ModelClass[FalconH1Config]:
    from megamult.models.falcon_h1.model import FalconH1

    return FalconH1


def _standard_deviations(sizes: FalconH1Config) -> Mapping[str, float]:
    from megamult.models.falcon_h1.parameters import standard_deviations  # needs Megatron

    return standard_deviations(sizes)


def _details(sizes: FalconH1Config, tensor: int, dtype: torch.dtype) -> str:
    if not sizes.mixer_layers:
        return ""
    return scan.described(sizes.mixer.local(tensor), device.local_device(), dtype)


FALCON_H1 = Architecture(
    name="falcon_h1",
    hugging_face_classes={MODEL_TYPE: HUGGING_FACE_CLASS},
    sizes=FalconH1Config,
    model=_model,
    flops_per_token=flops_per_token,
    activation_memory=activation_memory,
    weights=weights,
    standard_deviations=_standard_deviations,
    to_hugging_face=to_hugging_face,
    from_hugging_face=from_hugging_face,
    forward_multipliers=forward_multipliers,
    details=_details,
    embedding_factor=True,
)
