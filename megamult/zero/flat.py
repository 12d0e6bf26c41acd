"""Partition of ZeRO 1 and 2, and what it shares with that of DeepSpeed's bf16 optimizer (:mod:`megamult.zero.bf16`).

Each param group is one flat buffer, which is cut over data-parallel ranks. The cut between two ranks may go through a
parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.parameters.stated import spec_of
from megamult.zero.partition import Cut, Partition, Slice, flat_intervals


class FlatPartition(Partition):
    """Partition of flat buffers, one per param group. The offset of each parameter in its buffer is known, and each
    data-parallel rank holds an equal part of every buffer."""

    sharded = True

    def __init__(self, zero: Any, mesh: Mesh) -> None:
        self._zero, self.mesh = zero, mesh
        self.group = zero.real_dp_process_group[0]
        self.slices, self.cuts = [], []
        self._places: list[tuple[int, int]] = []  # for each slice: param group, position in this rank's part
        self.parameters = {}

    def _add_group(
        self,
        group: int,
        parameters: Sequence[Parameter],
        offsets: Sequence[int],
        process_group: torch.distributed.ProcessGroup,
        master: Tensor,
        names: Mapping[Parameter, str],
    ) -> None:
        rank, size = process_group.rank(), master.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            name = names[parameter]
            cut = Cut(
                name,
                spec_of(parameter, name),
                flat_intervals(offset, parameter.numel(), size, process_group.size()),
                parameter.dtype,
            )
            self.cuts.append(cut)
            self.parameters[name] = parameter
            start, length = cut.intervals[rank]
            if length:
                position = offset + start - rank * size
                source = parameter.detach().view(-1)[start : start + length]
                self.slices.append(Slice(name, cut.spec, start, length, master, position, source))
                self._places.append((group, position))

    def spread(self) -> None:
        """Run the all-gather that DeepSpeed runs at the end of a step."""
        self._zero.update_lp_params()

    def read_back(self, piece: Slice) -> Tensor | None:
        """Return the fragment of the flat fp32 partition that DeepSpeed has linked to the parameter."""
        mapping = self.parameters[piece.name]._hp_mapping  # type: ignore[attr-defined]
        address = mapping.lp_fragment_address
        if (address.start, address.numel) != (piece.start, piece.length):
            raise self._mismatch(
                piece, f"belong to elements [{address.start}:{address.start + address.numel}] according to DeepSpeed"
            )
        return mapping.get_hp_fragment()


class Zero12Partition(FlatPartition):
    """Partition of `DeepSpeedZeroOptimizer` (stage_1_and_2.py): ZeRO 1 and 2."""

    def __init__(self, zero: Any, names: Mapping[Parameter, str], mesh: Mesh) -> None:
        if zero.cpu_offload:
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer is set: gradients are then never together on the "
                "device, where megamult clips them; remove it"
            )
        super().__init__(zero, mesh)
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            parameters, offsets = zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]
            self._add_group(group, parameters, offsets, zero.real_dp_process_group[group], master, names)

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each slice, as a view into DeepSpeed's `averaged_gradients`.

        `averaged_gradients` has a list of tensors for each param group. These tensors tile this rank's partition of the
        group.
        """
        tiles: dict[int, dict[int, Tensor]] = {}
        for group, tensors in self._zero.averaged_gradients.items():
            position, tiles[group] = 0, {}
            for i, tensor in enumerate(tensors):
                if not tensor.is_contiguous():
                    tensors[i] = tensor = tensor.contiguous()
                tiles[group][position] = tensor.view(-1)
                position += tensor.numel()
            size = self._zero.single_partition_of_fp32_groups[group].numel()
            if position != size:
                raise RuntimeError(
                    f"DeepSpeed's gradients of param group {group} have {position} elements, and its partition has "
                    f"{size}: this version lays them out differently; install the version in constraints.txt"
                )
        gradients = []
        for piece, (group, position) in zip(self.slices, self._places, strict=True):
            begin = max(p for p in tiles[group] if p <= position)
            gradients.append(tiles[group][begin][position - begin : position - begin + piece.length])
        return gradients
