"""Partitions of ZeRO 0. Every data-parallel rank holds and updates whole parameters: fp32 parameters themselves, or
fp32 copies of bf16 parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.parameters.stated import spec_of
from megamult.zero.partition import Cut, Partition, Slice


class WholePartition(Partition):
    """Partition whose masters are the parameters themselves, for DeepSpeed at ZeRO 0 in fp32 and for training loops
    without DeepSpeed. A parameter that is not in `names` is named by its group and index."""

    sharded = False

    def __init__(self, param_groups: Sequence[Mapping[str, Any]], names: Mapping[Parameter, str], mesh: Mesh) -> None:
        numbered = {
            p: names.get(p, f"param_groups[{g}]['params'][{i}]")
            for g, group in enumerate(param_groups)
            for i, p in enumerate(group["params"])
        }
        self._build([(p, p) for p in numbered], numbered, mesh)

    def _build(self, pairs: list[tuple[Parameter, Tensor]], names: Mapping[Parameter, str], mesh: Mesh) -> None:
        self.mesh, self.group = mesh, mesh.groups.get("data")
        self.parameters = {names[parameter]: parameter for parameter, _ in pairs}
        self._borrowed: list[Parameter] = []  # parameters whose .grad is a view of main_grad
        self.slices, self.cuts = [], []
        for parameter, master in pairs:
            name = names[parameter]
            spec, numel = spec_of(parameter, name), parameter.numel()
            self.slices.append(Slice(name, spec, 0, numel, master, 0, parameter.detach().view(-1)))
            self.cuts.append(Cut(name, spec, ((0, numel),) * mesh.grid.data, parameter.dtype))

    def gradients(self) -> list[Tensor]:
        """Return the flattened gradient of each parameter: `.grad`, or Megatron DDP's `main_grad`, or zeros if it has
        neither.

        Raises:
            RuntimeError: no parameter has a gradient, or a `main_grad` that is used, because there is no `.grad`, has
                another dtype than its parameter.
        """
        if all(p.grad is None and getattr(p, "main_grad", None) is None for p in self.parameters.values()):
            raise RuntimeError(
                f"none of the {len(self.parameters)} parameters has a gradient: call backward before step, and leave "
                "gradients in .grad or main_grad"
            )
        for parameter, piece in zip(self.parameters.values(), self.slices, strict=True):
            main = getattr(parameter, "main_grad", None)
            if parameter.grad is None and main is not None:
                if main.dtype != parameter.dtype:
                    raise RuntimeError(
                        f"{piece.name} is {parameter.dtype}, and its main_grad is {main.dtype}: without DeepSpeed "
                        "there are no fp32 masters; train in fp32, or let DeepSpeed wrap the optimizer"
                    )
                parameter.grad = main.view_as(parameter)
                self._borrowed.append(parameter)
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        return [parameter.grad.view(-1) for parameter in self.parameters.values() if parameter.grad is not None]

    def release(self) -> None:
        """Clear each `.grad` that is a view of `main_grad`, so that Megatron's hooks do not add it to `main_grad`."""
        for parameter in self._borrowed:
            parameter.grad = None
        self._borrowed.clear()


class UnfusedPartition(WholePartition):
    """Partition of `FP16_UnfusedOptimizer` (unfused_optimizer.py): ZeRO 0 in bf16, gradients accumulated in bf16."""

    def __init__(self, zero: Any, names: Mapping[Parameter, str], mesh: Mesh) -> None:
        pairs = [
            pair
            for parameters, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
            for pair in zip(parameters, masters, strict=True)
        ]
        self._build(pairs, names, mesh)
