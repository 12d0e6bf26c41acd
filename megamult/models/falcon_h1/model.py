"""Falcon-H1 on Megatron-Core's GPTModel: a decoder with other layers and other initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor

from megamult.models.common.decoder import Decoder
from megamult.models.common.mamba2.parameters import quantiles
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.falcon_h1.layer import layer_spec
from megamult.models.falcon_h1.parameters import standard_deviations
from megamult.parameters.roles import Placement
from megamult.parameters.spec import Role


class FalconH1(Decoder):
    """A decoder whose layers have attention and a Mamba-2 mixer side by side. Arguments and losses are those of the
    decoder."""

    @classmethod
    def layer_specs(
        cls, sizes: FalconH1Config, transformer: TransformerConfig, placement: Placement, **options: Any
    ) -> list[ModuleSpec]:
        """Return the specs of all layers (:func:`megamult.models.falcon_h1.layer.layer_spec`)."""
        transformer_layer = super().layer_specs(sizes, transformer, placement, **options)[0]
        shared = options.get("shared_columns", False)
        return [layer_spec(kind, transformer_layer, sizes.mixer, placement, shared) for kind in sizes.layer_kinds]

    @classmethod
    def initial_weights(
        cls, sizes: FalconH1Config
    ) -> tuple[Mapping[Role, float], Mapping[str, Callable[[Tensor], Tensor]]]:
        """Return standard deviations by role, and the quantile functions of what is not drawn from a normal
        distribution."""
        return standard_deviations(sizes), quantiles(sizes.mixer)
