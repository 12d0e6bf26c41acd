"""Norms in a model of Megatron's transformer layers, and the matrices that read their outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer import TransformerLayer


def norms_and_readers(model: torch.nn.Module) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (subject, name of the norm's weight, names of the modules that read its output) for each norm of a layer.

    The subject is what metrics call the norm (:mod:`megamult.monitor.names`): `attention_norm` or `mlp_norm`. A module
    in the place of a layer's attention that has several branches names those of their modules that read the norm in its
    attribute `readers`.
    """
    for name, module in model.named_modules():
        if isinstance(module, TransformerLayer):
            readers = getattr(module.self_attention, "readers", ("linear_qkv",))
            modules = tuple(f"{name}.self_attention.{reader}" for reader in readers)
            yield "attention_norm", f"{name}.input_layernorm.weight", modules
            yield "mlp_norm", f"{name}.pre_mlp_layernorm.weight", (f"{name}.mlp.linear_fc1",)
