"""Attachment of a two-phase optimizer to a DeepSpeed engine.

After it, `prepare` runs once in every optimizer step, before DeepSpeed steps the first param group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.nn import Parameter

from megamult.distributed.mesh import Mesh, current_mesh
from megamult.parameters.stated import check_complete, names_of
from megamult.zero.bf16 import Bf16Partition
from megamult.zero.flat import Zero12Partition
from megamult.zero.full_precision import FullPrecision
from megamult.zero.partition import Partition
from megamult.zero.stage3 import Zero3Partition
from megamult.zero.whole import UnfusedPartition, WholePartition

_PARTITIONS: dict[str, type] = {
    "DeepSpeedZeroOptimizer": Zero12Partition,
    "BF16_Optimizer": Bf16Partition,
    "DeepSpeedZeroOptimizer_Stage3": Zero3Partition,
    "FP16_UnfusedOptimizer": UnfusedPartition,
}


class TwoPhase(Protocol):
    """An optimizer whose `prepare` reads all reduced gradients, and whose `step` then only applies updates."""

    param_groups: list[dict[str, Any]]

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradients that the last `prepare` read, before clipping."""

    @property
    def finite(self) -> bool:
        """Whether all gradients that the last `prepare` read are finite."""

    def bind(self, partition: Partition) -> None:
        """Store the partition for later calls. Called once, after the partition was checked."""

    def prepare(self, partition: Partition) -> None:
        """Read all reduced gradients, and compute what needs all of them: norms, clip factors, whether to skip.

        Called once per optimizer step, before the first `step`.
        """

    def finish(self) -> None:
        """Discard what `prepare` decided for this step. Called once per optimizer step, after the last `step`."""


def partition_of(engine: Any, optimizer: TwoPhase, mesh: Mesh) -> Partition:
    """Return the partition of a DeepSpeed engine that wraps `optimizer`.

    Raises:
        ValueError: DeepSpeed chose an optimizer class that megamult does not know, or the param groups lack a trainable
            parameter of the model.
    """
    names = names_of(engine.module)
    if engine.optimizer is optimizer:
        return _complete(WholePartition(optimizer.param_groups, names, mesh), names)
    made = _PARTITIONS.get(type(engine.optimizer).__name__)
    if made is None:
        import deepspeed

        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} wraps the optimizer in {type(engine.optimizer).__name__}: megamult "
            f"knows {', '.join(_PARTITIONS)}; change the DeepSpeed configuration so that it uses one of these"
        )
    return _complete(made(engine.optimizer, names, mesh), names)


def _complete(partition: Partition, names: Mapping[Parameter, str]) -> Partition:
    check_complete({cut.name for cut in partition.cuts}, names.values())
    return partition


def attach(engine: Any, optimizer: TwoPhase, mesh: Mesh | None = None) -> Partition:
    """Make `engine.step()` run `optimizer.prepare` once, before DeepSpeed's first per-group `optimizer.step()`.

    Forward passes in bf16 then use the current fp32 masters of the multipliers. The masters are brought to every rank
    after each step and after `engine.load_checkpoint`.

    Args:
        engine: engine that `deepspeed.initialize(optimizer=optimizer, ...)` returned.
        optimizer: optimizer that the engine wraps.
        mesh: mesh of the processes. If it is None, Megatron's groups describe the mesh; if there are none, all
            processes are data-parallel.

    Returns:
        The checked partition of this rank.

    Raises:
        ValueError: DeepSpeed chose an optimizer class that megamult does not know, the param groups lack a trainable
            parameter of the model, or DeepSpeed would clip gradients.
        RuntimeError: this version of DeepSpeed lays its partitions out in a way that megamult does not know.
    """
    partition = partition_of(engine, optimizer, mesh or current_mesh())
    if engine.gradient_clipping() > 0:
        raise ValueError(
            f"gradient_clipping is {engine.gradient_clipping()} in the DeepSpeed configuration (DeepSpeed's default is "
            "1.0): DeepSpeed would clip the tensors that megamult puts in place of the gradients of weights and "
            "multipliers; set it to 0.0, and set clip_grad_norm of the optimizer"
        )
    partition.check()
    partition.full_precision = FullPrecision.of(partition)
    partition.stepped()
    optimizer.bind(partition)
    partition.take_over(engine, lambda: optimizer.finite)
    deepspeed_step = engine.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer.prepare(partition)
        try:
            result = deepspeed_step(*args, **kwargs)
            partition.stepped()
            return result
        finally:
            optimizer.finish()
            # DeepSpeed computed the norm of the tensors that `prepare` left in place of the gradients, but
            # engine.get_global_grad_norm() must return the norm of the gradients themselves.
            if hasattr(engine.optimizer, "_global_grad_norm"):
                engine.optimizer._global_grad_norm = optimizer.gradient_norm

    engine.optimizer.step = step
    deepspeed_load = engine.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        found = deepspeed_load(*args, **kwargs)
        partition.stepped()
        return found

    engine.load_checkpoint = load_checkpoint
    return partition
