"""Partition of ZeRO 3. Every parameter is cut evenly over the data-parallel ranks. On each rank, the pieces of
all parameters of one sub-group form a flat buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.parameters.stated import spec_of
from megamult.zero.partition import Cut, Partition, Slice, flat_intervals


class Zero3Partition(Partition):
    """Partition of `DeepSpeedZeroOptimizer_Stage3` (stage3.py)."""

    sharded = True

    def __init__(self, zero: Any, names: Mapping[Parameter, str], mesh: Mesh) -> None:
        if zero.offload_optimizer or zero.offload_param:
            raise ValueError(
                "deepspeed.zero_optimization offloads at stage 3: gradients are then never together on the device, "
                "where megamult clips them; remove offload_optimizer and offload_param"
            )
        self._zero, self.mesh = zero, mesh
        self.group = mesh.groups.get("data")
        self.slices, self.cuts = [], []
        self._places: list[tuple[int, int]] = []  # for each slice: sub-group, index of its parameter in the sub-group
        self.parameters = {}
        for sub_group, parameters in enumerate(zero.fp16_groups):
            master, position = zero.fp32_partitioned_groups_flat[sub_group], 0
            for i, parameter in enumerate(parameters):
                name, piece, group = names[parameter], parameter.partition_numel(), parameter.ds_process_group
                intervals = flat_intervals(0, parameter.ds_numel, piece, group.size())
                cut = Cut(name, spec_of(parameter, name), intervals, parameter.dtype)
                self.cuts.append(cut)
                self.parameters[name] = parameter
                start, length = cut.intervals[group.rank()]
                if length:
                    source = parameter.ds_tensor.detach().view(-1)[:length]
                    self.slices.append(Slice(name, cut.spec, start, length, master, position, source))
                    self._places.append((sub_group, i))
                position += piece

    def spread(self) -> None:
        """Gather again those small parameters that DeepSpeed keeps gathered between steps. They are released first,
        because gathering does nothing to a parameter that is already gathered."""
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def read_back(self, piece: Slice) -> Tensor:
        """Return this rank's part of a parameter's fp32 masters, read through DeepSpeed's accessor."""
        return self._zero.get_local_fp32_param(self.parameters[piece.name]).view(-1)[: piece.length]

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each slice, as a view into DeepSpeed's `averaged_gradients`.

        `averaged_gradients` has a list of tensors for each sub-group, one for each parameter of the sub-group.
        """
        averaged = self._zero.averaged_gradients
        return [
            averaged[sub_group][i].view(-1)[: piece.length]
            for piece, (sub_group, i) in zip(self.slices, self._places, strict=True)
        ]
