"""RMSNorm whose weight is a vector, one scalar or absent.

Every tensor-parallel rank holds the whole weight, and the weight's spec states this.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megamult.models.common.norm_weight import NormWeight
from megamult.parameters import megatron
from megamult.parameters.spec import Role
from megamult.parameters.stated import set_spec


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * w. x, y: [..., hidden]; w: [hidden] or [1].

    Under sequence parallelism, a rank computes the norm of only its part of the tokens, so the gradient of the weight
    is partial. The attribute `sequence_parallel` of the weight tells this to Megatron's training loop, and the spec
    tells it to megamult's optimizers. The gradient is partial too if the norm is applied to each attention head
    (QK-norm), because a tensor-parallel rank has only some of the heads.

    Args:
        config: Megatron's configuration of the transformer.
        hidden_size: number of features.
        eps: number added to the mean square.
        weight: kind of the weight w (:mod:`megamult.models.common.norm_weight`). If `frozen`, there is no w.
        role: role of the weight.
        per_head: whether the norm is applied to each attention head.
    """

    weight: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        weight: NormWeight = "vector",
        role: Role = "norm",
        per_head: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        if weight == "frozen":
            self.register_parameter("weight", None)
            return
        size = hidden_size if weight == "vector" else 1
        where = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=where))
        set_spec(self.weight, megatron.norm(size, partial=config.sequence_parallel or per_head, role=role))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x: [..., hidden], and multiply it by the weight if there is one."""
        shape = (x.shape[-1],)
        if self.weight is None or self.weight.shape == shape:
            return torch.nn.functional.rms_norm(x, shape, self.weight, self.eps)
        return torch.nn.functional.rms_norm(x, shape, None, self.eps) * self.weight
