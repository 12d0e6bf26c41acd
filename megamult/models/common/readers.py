"""Norms in a model of Megatron's transformer layers, and the matrices that read their outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer import TransformerLayer


def norms_and_readers(model: torch.nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (subject, name of the norm's weight, name of the module that reads its output) for each norm of a layer.

    The subject is what metrics call the norm (:mod:`megamult.monitor.names`): `attention_norm` or `mlp_norm`.
    """
    for name, module in model.named_modules():
        if isinstance(module, TransformerLayer):
            yield "attention_norm", f"{name}.input_layernorm.weight", f"{name}.self_attention.linear_qkv"
            yield "mlp_norm", f"{name}.pre_mlp_layernorm.weight", f"{name}.mlp.linear_fc1"
