"""ZeRO 0: every data-parallel rank holds and updates whole parameters, in fp32 or as fp32 copies of bf16 ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult import parallel
from megamult.layout import layout_of
from megamult.zero.slices import Cut, Partition, Slice


class WholePartition(Partition):
    """The parameters themselves: DeepSpeed at ZeRO 0 in fp32, and training loops without DeepSpeed."""

    sharded = False

    def __init__(self, param_groups: Sequence[Mapping[str, Any]], names: Mapping[Parameter, str]) -> None:
        parameters = [p for group in param_groups for p in group["params"]]
        self._build([(p, p) for p in parameters], names)

    def _build(self, pairs: list[tuple[Parameter, Tensor]], names: Mapping[Parameter, str]) -> None:
        self._parameters = [parameter for parameter, _ in pairs]
        self.slices, self.cuts = [], []
        for parameter, master in pairs:
            name = names[parameter]
            layout, numel = layout_of(parameter, name), parameter.numel()
            self.slices.append(Slice(name, layout, 0, numel, master, 0, parameter.detach().view(-1)))
            self.cuts.append(Cut(name, layout, ((0, numel),) * parallel.grid().data_size))

    def gradients(self) -> list[Tensor]:
        """The parameters' `.grad`; zeros where backward left none."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        return [parameter.grad.view(-1) for parameter in self._parameters if parameter.grad is not None]


class UnfusedPartition(WholePartition):
    """`FP16_UnfusedOptimizer` (unfused_optimizer.py): ZeRO 0 in bf16, gradients accumulated in bf16."""

    def __init__(self, zero: Any, names: Mapping[Parameter, str]) -> None:
        pairs = [
            pair
            for parameters, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
            for pair in zip(parameters, masters, strict=True)
        ]
        self._build(pairs, names)
