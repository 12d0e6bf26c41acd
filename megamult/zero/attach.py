"""Tie our two-phase optimizer to a DeepSpeed engine: `prepare` before the first of DeepSpeed's per-group steps."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import Parameter

from megamult.zero.flat import Bf16Partition, Zero12Partition
from megamult.zero.slices import Partition
from megamult.zero.stage3 import Zero3Partition
from megamult.zero.whole import UnfusedPartition, WholePartition

_PARTITIONS: dict[str, type] = {
    "DeepSpeedZeroOptimizer": Zero12Partition,
    "BF16_Optimizer": Bf16Partition,
    "DeepSpeedZeroOptimizer_Stage3": Zero3Partition,
    "FP16_UnfusedOptimizer": UnfusedPartition,
}


class TwoPhase(Protocol):
    """An optimizer whose `step` only applies what `prepare` decided on all reduced gradients."""

    param_groups: list[dict[str, Any]]

    def prepare(self, partition: Partition) -> None:
        """Once per optimizer step, before the first `step`."""

    def finish(self) -> None:
        """Once per optimizer step, after the last `step`."""


def names_of(module: torch.nn.Module) -> dict[Parameter, str]:
    """Name of each trainable parameter."""
    return {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}


def partition_of(engine: Any, optimizer: TwoPhase) -> Partition:
    """The partition of a DeepSpeed engine that wraps `optimizer`.

    Raises:
        ValueError: DeepSpeed chose an optimizer class that megamult does not know.
    """
    names = names_of(engine.module)
    if engine.optimizer is optimizer:
        return WholePartition(optimizer.param_groups, names)
    made = _PARTITIONS.get(type(engine.optimizer).__name__)
    if made is None:
        import deepspeed

        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} wraps the optimizer in {type(engine.optimizer).__name__}: megamult "
            f"knows {', '.join(_PARTITIONS)}; change the DeepSpeed configuration to one of them"
        )
    return made(engine.optimizer, names)


def attach(engine: Any, optimizer: TwoPhase) -> Partition:
    """Make `engine.step()` run `optimizer.prepare` once, before DeepSpeed's first per-group `optimizer.step()`.

    Args:
        engine: from `deepspeed.initialize(optimizer=optimizer, ...)`.
        optimizer: the one that the engine wraps.

    Returns:
        The checked partition of this rank.
    """
    partition = partition_of(engine, optimizer)
    partition.check()
    deepspeed_step = engine.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer.prepare(partition)
        try:
            return deepspeed_step(*args, **kwargs)
        finally:
            optimizer.finish()

    engine.optimizer.step = step
    return partition
