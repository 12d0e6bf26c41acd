"""Mamba-2 mixer with multipliers on its projections, sharded by heads over tensor-parallel ranks.

    [z, x, B, C, dt] = W_in u          [x, B, C] = SiLU(conv([x, B, C]))          dt = softplus(dt + dt_bias)
    y = SSD(x, dt, -exp(A_log), B, C, D)          output = W_out (y SiLU(z))

A rank computes its heads. If there are fewer groups than ranks, ranks hold copies of a group's B and C; each gets the
part of their gradient that its heads give, and the optimizer step sums the parts. With an inner norm, y SiLU(z) is
normalized over the channels of each group.

Source: arXiv 2405.21060. The order of rows in W_in is that of Megatron-Core and of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from megamult.distributed import device
from megamult.layers import MultiplierColumnParallelLinear, MultiplierRowParallelLinear
from megamult.models.common.mamba2 import parameters
from megamult.models.common.mamba2.scan import scan, use_fused
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.multipliers.parameters import full_precision
from megamult.parameters.axes import tensor_shard
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import set_spec


class Mixer(torch.nn.Module):
    """Mamba-2 mixer. Its weights are not initialized.

    Args:
        config: Megatron's configuration of the transformer.
        sizes: global sizes of the mixer.
        placement: sides that have multipliers, by role.
        tp_group: tensor-parallel group.
        shared_columns: whether the five matrices of the input projection have the same column multipliers.

    Attributes:
        fused: whether fused kernels compute what is between the projections
            (:mod:`megamult.models.common.mamba2.scan`).

    Raises:
        ValueError: the sizes cannot be sharded over the group, or ask for fused kernels that cannot be used here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        sizes: MixerSizes,
        placement: Placement,
        tp_group: torch.distributed.ProcessGroup,
        shared_columns: bool = False,
    ) -> None:
        super().__init__()
        ranks = tp_group.size()
        sizes.check_sharding(ranks)
        self.sizes, self.here, self._group, self._eps = sizes, sizes.local(ranks), tp_group, config.layernorm_epsilon
        self.fused = use_fused(self.here, device.local_device(), config.params_dtype)
        common: dict[str, Any] = {
            "config": config,
            "init_method": _unchanged,
            "bias": False,
            "placement": placement,
            "grad_sync": "step",
            "tp_group": tp_group,
        }
        # Megatron divides the output size by the number of ranks, but copies are on several of them.
        self.in_proj = MultiplierColumnParallelLinear(
            config.hidden_size,
            sum(self.here.rows) * ranks,
            spec=parameters.in_projection(sizes, config.hidden_size),
            gather_output=False,
            shared_columns=shared_columns,
            **common,
        )
        self.conv_weight = self._parameter(config, parameters.convolution(sizes))
        self.conv_bias = self._parameter(config, parameters.convolution_bias(sizes)) if sizes.conv_bias else None
        self.dt_bias, self.A_log, self.D = (
            self._parameter(config, parameters.of_heads(role, sizes)) for role in ("ssm_dt_bias", "ssm_a", "ssm_d")
        )
        self.norm_weight = None if sizes.norm == "none" else self._parameter(config, parameters.norm(sizes))
        self.out_proj = MultiplierRowParallelLinear(
            sizes.inner,
            config.hidden_size,
            role="ssm_out" if sizes.norm == "none" else "ssm_out_normed",
            input_is_parallel=True,
            skip_bias_add=False,
            **common,
        )

    def _parameter(self, config: TransformerConfig, spec: ParameterSpec) -> Parameter:
        shape = spec.local_shape(tensor_shard(self._group.rank(), self._group.size()).grid)
        where = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        made = Parameter(torch.empty(shape, dtype=config.params_dtype, device=where))
        set_spec(made, spec)
        return made

    def forward(self, hidden: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the mixer's output.

        Args:
            hidden: [seq, batch, hidden], or this rank's part of the sequence under sequence parallelism.
            documents: [batch, seq] number of the document of each token, which never falls along a sequence; None means
                that all belong to one. The state is 0 at the start of a document.

        Returns:
            [seq, batch, hidden], or this rank's part of the sequence.
        """
        here = self.here
        projected = self.in_proj(hidden)[0].transpose(0, 1)
        z, channels, dt = projected.split([here.inner, here.inner + 2 * here.shared, here.heads], -1)
        y = scan(
            channels,
            dt,
            self.conv_weight,
            self.conv_bias,
            -full_precision(self.A_log).exp(),
            full_precision(self.D),
            full_precision(self.dt_bias),
            here,
            documents,
            self.fused,
        )
        return self.out_proj(self._gated(y, z).transpose(0, 1).contiguous())[0]

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the output with gate and inner norm, [batch, seq, inner/tp]."""
        if self.norm_weight is None:
            return y * F.silu(z)
        if self.sizes.norm == "before_gate":
            return self._normed(y) * F.silu(z)
        return self._normed(y * F.silu(z))

    def _normed(self, y: Tensor) -> Tensor:
        """Return y divided by its root mean square over the channels of each group, times the norm's weight."""
        assert self.norm_weight is not None
        grouped = _wide(y).unflatten(-1, (self.here.groups, -1))
        squares = grouped.square().sum(-1, keepdim=True)
        if self.sizes.groups < self._group.size():
            squares = _summed_over_copies(squares, self.sizes.groups, self._group)
        mean = squares / (self.sizes.inner // self.sizes.groups)
        return ((grouped * torch.rsqrt(mean + self._eps)).flatten(-2) * self.norm_weight).to(y.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, or in fp64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _summed_over_copies(squares: Tensor, groups: int, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Sum over the ranks that share a group, [batch, seq, 1, 1]. Backward sums the gradients over the same ranks."""
    own = tp_group.rank() * groups // tp_group.size()
    of_groups = F.pad(squares, (0, 0, own, groups - 1 - own))
    # One of these functions sums in forward only, the other one in backward only. Each rank's part of the loss depends
    # on the sum, so both are needed.
    summed = copy_to_tensor_model_parallel_region(
        reduce_from_tensor_model_parallel_region(of_groups, tp_group), tp_group
    )
    return summed[..., own : own + 1, :]


def _unchanged(weight: Tensor) -> Tensor:
    """Return a weight unchanged, because initial weights are set when the whole model is built."""
    return weight
