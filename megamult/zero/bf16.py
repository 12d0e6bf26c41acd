"""Partition of DeepSpeed's bf16 optimizer (ZeRO 1 with fp32 gradient accumulation), and its own reduction of gradients
and gathering of parameters, which replace DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.distributed.parts import average_own_part, spread_own_part
from megamult.zero.flat import FlatPartition


class Bf16Partition(FlatPartition):
    """Partition of `BF16_Optimizer` (bf16_optimizer.py)."""

    def __init__(self, zero: Any, names: Mapping[Parameter, str], mesh: Mesh) -> None:
        super().__init__(zero, mesh)
        # Since gradients were cleared: whether `gradients` was called, and whether they were reduced.
        self._given = self._reduced = False
        for group, master in enumerate(zero.fp32_groups_flat_partition):
            offsets, offset = [], 0
            for parameter in zero.bf16_groups[group]:
                offsets.append(offset)
                offset += parameter.numel()
            self._add_group(group, zero.bf16_groups[group], offsets, zero.real_dp_process_group[group], master, names)

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each slice, as a view into the flat fp32 gradient of the partition."""
        self._given = True
        flat = self._zero.fp32_groups_gradient_flat_partition
        return [
            flat[group][position : position + piece.length]
            for piece, (group, position) in zip(self.slices, self._places, strict=True)
        ]

    def take_over(self, engine: Any, finite: Callable[[], bool]) -> None:
        """Replace those parts of DeepSpeed's step that do more than a step of this partition needs.

        - DeepSpeed copies all gradients of the model into a new buffer, all-reduces it, and copies it back. A rank
          needs only its own part of the flat gradients, and here this part is averaged in place. If there is only one
          data-parallel rank, there is nothing to reduce. It is averaged once per step: a second backward pass that ends
          a step is refused.
        - DeepSpeed computes a norm of all gradients of the model, only to see whether it is finite. The optimizer knows
          it.
        - DeepSpeed's all-gather of the parameters is slow over gloo (:mod:`megamult.distributed.parts`).
        - DeepSpeed clears the gradients twice.

        If gradients travel in another dtype than that of their sums, if they are summed and not averaged, or if
        DeepSpeed's pipeline, sequence parallelism or experts are used, all of this stays DeepSpeed's.
        """
        zero = self._zero
        if engine.communication_data_type != zero.grad_acc_dtype or not engine.gradient_average:
            return
        if engine.pipeline_parallelism or engine.sequence_parallel_size > 1 or zero.has_moe_layers:
            return
        clear = zero.clear_hp_grads

        def reduce_gradients(pipeline_parallel: bool = False) -> None:
            if self._reduced:
                raise RuntimeError(
                    "gradients were reduced twice in one step: call engine.backward once per micro-batch, with the sum "
                    "of the losses, and then engine.step"
                )
            self._reduced = True
            for flat, group in zip(zero.fp32_groups_gradients_flat, zero.real_dp_process_group, strict=True):
                average_own_part(flat, group)

        def get_grads_for_norm(for_clipping: bool = False) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
            # The other ranks' parts are not averaged, so a norm of them could be finite on one rank only.
            return [torch.tensor([0.0 if finite() else torch.inf])], {}

        @torch.no_grad()
        def update_lp_params() -> None:
            for group, master in enumerate(zero.fp32_groups_flat_partition):
                process_group = zero.real_dp_process_group[group]
                zero.bf16_partitioned_groups[group][process_group.rank()].copy_(master)
                spread_own_part(zero.bf16_groups_flat[group], process_group)

        def clear_hp_grads() -> None:
            if self._given or self._reduced or any(map(any, zero.fp32_groups_has_gradients)):
                clear()
                self._given = self._reduced = False

        zero.reduce_gradients = reduce_gradients  # the engine calls it in place of its own reduction
        zero.get_grads_for_norm = get_grads_for_norm
        zero.update_lp_params = update_lp_params
        zero.clear_hp_grads = clear_hp_grads
