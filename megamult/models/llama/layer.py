"""Megatron-Core's ModuleSpec for a layer of Llama with multipliers."""

from __future__ import annotations

from megatron.core.transformer import ModuleSpec, TransformerConfig

from megamult.models.common.architecture import PlacementSetting
from megamult.models.common.config import AttentionBias
from megamult.models.common.norm_weight import NormWeight
from megamult.models.common.transformer_layer import transformer_layer_spec
from megamult.multipliers.parameters import GradSync
from megamult.parameters.roles import resolve


def gpt_layer_spec(
    config: TransformerConfig,
    placement: PlacementSetting = "all",
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
        placement: sides that have multipliers: `all`, `symmetry_free` or `scalar` (explained in
            :func:`megamult.parameters.roles.placements`), or a mapping from role to row, col or scalar. `{}` means no
            multipliers.
        shared_columns, grad_sync, recompute, norms, attention_bias, mlp_bias: the same as for
            :func:`megamult.models.common.transformer_layer.transformer_layer_spec`.

    Raises:
        ValueError: the placement is unknown, or the configuration's MLP is not gated.
    """
    return transformer_layer_spec(
        config,
        resolve(placement),
        shared_columns=shared_columns,
        grad_sync=grad_sync,
        recompute=recompute,
        norms=norms,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
