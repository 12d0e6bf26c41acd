"""ZeRO 1 and 2, and the bf16 optimizer with fp32 accumulation: each group is one flat buffer, cut over DP ranks.

A parameter may straddle two ranks' partitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from megamult.layout import layout_of
from megamult.zero.slices import Partition, Slice


def _cut(
    parameters: Sequence[Parameter],
    offsets: Sequence[int],
    partition_start: int,
    master: Tensor,
    names: Mapping[Parameter, str],
) -> tuple[list[Slice], list[int]]:
    """The slices of one group's partition, and where each begins in it."""
    slices, positions = [], []
    partition_stop = partition_start + master.numel()
    for parameter, offset in zip(parameters, offsets, strict=True):
        start = max(offset, partition_start)
        stop = min(offset + parameter.numel(), partition_stop)
        if start < stop:
            position, first, length = start - partition_start, start - offset, stop - start
            slices.append(
                Slice(
                    names[parameter],
                    layout_of(parameter, names[parameter]),
                    first,
                    length,
                    master.detach()[position : position + length],
                    parameter.detach().view(-1)[first : first + length],
                )
            )
            positions.append(position)
    return slices, positions


class Zero12Partition(Partition):
    """`DeepSpeedZeroOptimizer` (stage_1_and_2.py)."""

    sharded = True

    def __init__(self, zero: Any, names: Mapping[Parameter, str]) -> None:
        if zero.cpu_offload:
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer is set: gradients then never meet on the device, where "
                "megamult clips them; remove it"
            )
        self._zero = zero
        self.slices = []
        self._places: list[tuple[int, int]] = []  # (group, position in the partition)
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            rank = zero.real_dp_process_group[group].rank()
            slices, positions = _cut(
                zero.round_robin_bit16_groups[group],
                zero.round_robin_bit16_offsets[group],
                rank * zero.partition_size[group],
                master,
                names,
            )
            self.slices += slices
            self._places += [(group, position) for position in positions]

    def gradients(self) -> list[Tensor]:
        """Views into `averaged_gradients`: per group a list of tensors that tile the partition."""
        tiles: dict[int, dict[int, Tensor]] = {}
        for group, tensors in self._zero.averaged_gradients.items():
            position, tiles[group] = 0, {}
            for i, tensor in enumerate(tensors):
                if not tensor.is_contiguous():
                    tensors[i] = tensor = tensor.contiguous()
                tiles[group][position] = tensor.view(-1)
                position += tensor.numel()
        gradients = []
        for piece, (group, position) in zip(self.slices, self._places, strict=True):
            begin = max(p for p in tiles[group] if p <= position)
            gradients.append(tiles[group][begin][position - begin : position - begin + piece.length])
        return gradients


class Bf16Partition(Partition):
    """`BF16_Optimizer` (bf16_optimizer.py): ZeRO 1 in bf16 with fp32 gradient accumulation."""

    sharded = True

    def __init__(self, zero: Any, names: Mapping[Parameter, str]) -> None:
        self._zero = zero
        self.slices = []
        self._places: list[tuple[int, int]] = []
        for group, master in enumerate(zero.fp32_groups_flat_partition):
            rank = zero.real_dp_process_group[group].rank()
            offsets, offset = [], 0
            for parameter in zero.bf16_groups[group]:
                offsets.append(offset)
                offset += parameter.numel()
            slices, positions = _cut(zero.bf16_groups[group], offsets, rank * master.numel(), master, names)
            self.slices += slices
            self._places += [(group, position) for position in positions]

    def gradients(self) -> list[Tensor]:
        """Views into the flat fp32 gradient of the partition."""
        flat = self._zero.fp32_groups_gradient_flat_partition
        return [
            flat[group][position : position + piece.length]
            for piece, (group, position) in zip(self.slices, self._places, strict=True)
        ]
