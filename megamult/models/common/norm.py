"""RMSNorm that states its layout: its weight is replicated, its gradient partial under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megamult.parameters import megatron
from megamult.parameters.stated import set_spec


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension. x, y: [..., hidden]; w: [hidden].

    Under sequence parallelism a rank sees its part of the tokens alone, so the weight's gradient is partial:
    `sequence_parallel` tells Megatron's loop, the layout tells our optimizer.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        where = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=where))
        set_spec(self.weight, megatron.norm(hidden_size, partial=config.sequence_parallel))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize and scale."""
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
