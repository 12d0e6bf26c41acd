"""RMSNorm whose weight has a spec: it is replicated, and under sequence parallelism its gradient is partial."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megamult.parameters import megatron
from megamult.parameters.stated import set_spec


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * w. x, y: [..., hidden]; w: [hidden].

    Under sequence parallelism, a rank computes the norm of only its part of the tokens, so the gradient of the weight
    is partial. The attribute `sequence_parallel` of the weight tells this to Megatron's training loop, and the spec
    tells it to megamult's optimizers.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        where = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=where))
        set_spec(self.weight, megatron.norm(hidden_size, partial=config.sequence_parallel))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize and scale x: [..., hidden]."""
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
