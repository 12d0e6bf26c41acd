"""Layers of Falcon-H1: attention and mixer side by side, and layers that have only one of mixer, attention and MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayerSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megamult.models.common.documents import DocumentMask
from megamult.models.common.mamba2.mixer import Mixer
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.parameters.roles import Placement


class SideBySide(torch.nn.Module):
    """Sum of attention and mixer, which read the same norm's output; or only one of them.

    The module is in the place of a TransformerLayer's attention and is called as this.

    Args:
        config: Megatron's configuration of the transformer.
        layer_number: number of the layer, from 1.
        pg_collection: Megatron's process groups.
        attention: spec of the attention; None if the layer has none.
        mixer: sizes of the mixer; None if the layer has none.
        placement: sides that have multipliers, by role.
        shared_columns: whether the matrices of the mixer's input projection have the same column multipliers. Those of
            attention say it themselves.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attention: ModuleSpec | None,
        mixer: MixerSizes | None,
        placement: Placement,
        shared_columns: bool = False,
    ) -> None:
        super().__init__()
        self.mixer = None if mixer is None else Mixer(config, mixer, placement, pg_collection.tp, shared_columns)
        self.attention = (
            None
            if attention is None
            else build_module(attention, config=config, layer_number=layer_number, pg_collection=pg_collection)
        )

    @property
    def branches(self) -> dict[str, torch.nn.Module]:
        """The modules whose outputs are summed, by their names in metrics."""
        both = {"attention": self.attention, "mixer": self.mixer}
        return {name: branch for name, branch in both.items() if branch is not None}

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the modules within this one whose matrices read the norm's output."""
        names = {"attention": "attention.linear_qkv", "mixer": "mixer.in_proj"}
        return tuple(names[branch] for branch in self.branches)

    def forward(
        self, hidden: Tensor, attention_mask: DocumentMask | None = None, **for_attention: Any
    ) -> tuple[Tensor, None]:
        """Return the summed outputs, [seq, batch, hidden], and None in place of a bias.

        Args:
            hidden: [seq, batch, hidden], or this rank's part of the sequence.
            attention_mask: documents that do not see each other; None means one document.
            for_attention: further arguments of Megatron's attention.
        """
        outputs = []
        if self.mixer is not None:
            outputs.append(self.mixer(hidden, None if attention_mask is None else attention_mask.documents))
        if self.attention is not None:
            output, _ = self.attention(hidden, attention_mask=attention_mask, **for_attention)
            outputs.append(output)
        return (outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]), None


def layer_spec(
    kind: str, transformer_layer: ModuleSpec, mixer: MixerSizes, placement: Placement, shared_columns: bool = False
) -> ModuleSpec:
    """Return the ModuleSpec of a layer.

    Args:
        kind: letter of :data:`megamult.models.falcon_h1.config.LAYERS`.
        transformer_layer: spec of a layer of attention and MLP
            (:func:`megamult.models.common.transformer_layer.transformer_layer_spec`).
        mixer: sizes of the mixer.
        placement: sides that have multipliers, by role.
        shared_columns: whether the matrices of the mixer's input projection have the same column multipliers.
    """
    whole: TransformerLayerSubmodules = transformer_layer.submodules
    params = {
        "attention": whole.self_attention if kind in "H*" else None,
        "mixer": mixer if kind in "HM" else None,
        "placement": placement,
        "shared_columns": shared_columns,
    }
    submodules = replace(whole, self_attention=ModuleSpec(SideBySide, params=params))
    if kind == "-":
        submodules = replace(
            submodules, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
        )
    elif kind != "H":
        submodules = replace(submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    return replace(transformer_layer, submodules=submodules)
