"""Models of published sizes on the meta device, which has shapes and no memory, and the modules of a small one."""

from __future__ import annotations

from typing import Any

import torch

from megamult.models.falcon_h1.config import FalconH1Config


def readers(sizes: FalconH1Config, vocab_size: int) -> tuple[list[tuple[str, str, tuple[str, ...]]], set[str]]:
    """Norms and the modules that read them, and the names of the modules that hold a weight."""
    from megamult.distributed import start
    from megamult.models.common.readers import norms_and_readers
    from megamult.models.falcon_h1.model import FalconH1

    start.initialize(1)
    model = FalconH1(sizes, vocab_size, seed=1)
    holders = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")}
    return list(norms_and_readers(model)), holders


def initial(sizes: list[FalconH1Config], vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Initial values of each model's parameters, by name."""
    from megamult.distributed import start
    from megamult.models.falcon_h1.model import FalconH1

    start.initialize(1)
    models = [FalconH1(each, vocab_size, seed=1, placement={}) for each in sizes]
    return [{name: parameter.detach() for name, parameter in model.named_parameters()} for model in models]


def without_attention(sizes: FalconH1Config, tensor: int) -> tuple[float, int]:
    """Loss of one pass of a model, and attention heads of a rank in Megatron's configuration for `tensor` ranks."""
    from megamult.distributed import start
    from megamult.models.common.decoder import transformer_config
    from megamult.models.falcon_h1.model import FalconH1

    start.initialize(1)
    tokens = torch.arange(2 * sizes.seq_length).view(2, -1) % 100
    objective, _ = FalconH1(sizes, 100, seed=1)(tokens, tokens)
    config = transformer_config(sizes, torch.float32, tensor, sequence_parallel=False)
    return objective.item(), config.num_attention_heads // tensor


def counts(sizes: dict[str, FalconH1Config]) -> dict[str, dict[str, int]]:
    """Return the number of parameters without multipliers, and of multipliers in each placement, by model."""
    from megamult.distributed import device, start
    from megamult.models.falcon_h1.model import FalconH1
    from megamult.parameters.stated import named_specs

    start.initialize(1)
    meta: Any = torch.device("meta")
    torch.cuda.current_device = lambda: meta  # where Megatron and our layers allocate
    device.local_device = lambda: meta
    found: dict[str, dict[str, int]] = {}
    for name, each in sizes.items():
        assert each.vocab_size is not None
        found[name] = {}
        for placement in ("all", "symmetry_free", "scalar"):
            model = FalconH1(each, each.vocab_size, seed=None, placement=placement, dtype=torch.bfloat16)
            assert all(parameter.device == meta for parameter in model.parameters())
            specs = [spec for _, _, spec in named_specs(model)]
            # Logical tensors: without the rows that pad the vocabulary.
            found[name]["weights"] = sum(spec.numel_logical for spec in specs if spec.side is None)
            found[name][placement] = sum(spec.numel_logical for spec in specs if spec.side is not None)
    return found
