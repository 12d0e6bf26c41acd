"""Megatron-Core's ModuleSpec for a transformer layer with multipliers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megamult.layers import MultiplierColumnParallelLinear, MultiplierRowParallelLinear
from megamult.models.common import parameters
from megamult.models.common.attention import RotatedSelfAttention, SdpaAttention
from megamult.models.common.config import AttentionBias
from megamult.models.common.norm import RMSNorm
from megamult.models.common.norm_weight import NormWeight
from megamult.models.common.swiglu import SwiGLU
from megamult.multipliers.parameters import GradSync
from megamult.parameters.roles import Placement


class RecomputedTransformerLayer(TransformerLayer):
    """Transformer layer that saves only its input. Backward runs the layer's forward pass again.

    It does not save the state of random number generators, because the layer has no dropout.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run Megatron's TransformerLayer; arguments and results are the same."""
        run = super().forward
        if not torch.is_grad_enabled():
            return run(hidden_states, *args, **kwargs)
        # Reentrant checkpointing runs the first pass without a graph, so that nothing is saved in it. With a graph, the
        # layers' own hooks on saved tensors would keep the activations that recomputation is meant to avoid storing.
        output = torch.utils.checkpoint.checkpoint(
            lambda hidden: run(hidden, *args, **kwargs)[0],
            hidden_states,
            use_reentrant=True,
            preserve_rng_state=False,
        )
        return output, kwargs.get("context")


def transformer_layer_spec(
    config: TransformerConfig,
    placement: Placement,
    *,
    shared_columns: bool = False,
    grad_sync: GradSync = "backward",
    recompute: bool = False,
    norms: NormWeight = "vector",
    attention_bias: AttentionBias | None = None,
    mlp_bias: bool | None = None,
) -> ModuleSpec:
    """Return the ModuleSpec of a pre-norm transformer layer whose matrices have multipliers.

    The layer consists of RMSNorm, grouped-query attention and a gated MLP. If `config.qk_layernorm` is True, an RMSNorm
    normalizes each head's query and key.

    Args:
        config: Megatron's configuration, from which sizes of heads, groups and MLP are read.
        placement: sides that have multipliers, by role.
        shared_columns: whether Q, K and V have the same column multipliers, and gate and up too.
        grad_sync: when the gradients of replicated multipliers are summed over tensor-parallel ranks
            (:mod:`megamult.multipliers.parameters`). "step" needs an optimizer of this package.
        recompute: whether a layer saves only its input, and backward runs the layer's forward pass again.
        norms: kind of the weights of the norms before attention and MLP.
        attention_bias: projections of attention that have a bias; None: as `config.add_bias_linear` and
            `config.add_qkv_bias` say.
        mlp_bias: whether the matrices of the MLP have biases; None: as `config.add_bias_linear` says.

    Raises:
        ValueError: the configuration's MLP is not gated.
    """
    if not config.gated_linear_unit:
        raise ValueError("gated_linear_unit is False: this layer's MLP is gated (SwiGLU); set it to True")
    common: dict[str, Any] = {"placement": placement, "grad_sync": grad_sync}
    fused: dict[str, Any] = {"shared_columns": shared_columns, **common}
    into: dict[str, Any] = {"own_bias": None if attention_bias is None else attention_bias != "none", **fused}
    out: dict[str, Any] = {"own_bias": None if attention_bias is None else attention_bias == "all", **common}
    of_head = ("q", "k") if config.qk_layernorm else ()
    attention = SelfAttentionSubmodules(
        linear_qkv=partial(MultiplierColumnParallelLinear, spec=parameters.qkv(config), **into),
        core_attention=SdpaAttention,
        linear_proj=ModuleSpec(MultiplierRowParallelLinear, params={"role": "attention_out", **out}),
        **{
            f"{each}_layernorm": ModuleSpec(RMSNorm, params={"role": f"{each}_norm", "per_head": True})
            for each in of_head
        },
    )
    mlp = MLPSubmodules(
        linear_fc1=ModuleSpec(
            MultiplierColumnParallelLinear,
            params={"spec": parameters.gate_up(config), "own_bias": mlp_bias, **fused},
        ),
        activation_func=SwiGLU,
        linear_fc2=ModuleSpec(MultiplierRowParallelLinear, params={"role": "down", "own_bias": mlp_bias, **common}),
    )
    norm = ModuleSpec(RMSNorm, params={"weight": norms})
    return ModuleSpec(
        module=RecomputedTransformerLayer if recompute else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                RotatedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
