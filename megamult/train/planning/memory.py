"""Memory of a rank by kind, in bytes, of a run that runs or is only planned.

What a rank keeps follows from its partition and optimizer (:mod:`megamult.zero.memory`, :mod:`megamult.optim.memory`),
what a pass keeps from the architecture, and what Muon needs for a moment from its plan. The kinds of one phase are
there together; those of different phases are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamult.config import Config
from megamult.models.architectures import architecture_of
from megamult.models.common.activation_memory import Pass, Saved
from megamult.monitor import screen
from megamult.optim.memory import FOLDED, state_by_name
from megamult.optim.muon.matrices import MatrixRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.roles import ROLES
from megamult.zero import memory as zero_memory
from megamult.zero.partition import Partition
from megamult.zero.stage3 import Zero3Partition

KEPT = ("weights", "fp32 masters", "gradients", "moments", "momentum", FOLDED, "fp32 multipliers")
"""Kinds that a rank keeps in all phases."""
PASSES = ("activations", "logits or recomputed layer", "one weight", "gathered parameters", "buckets")
"""Kinds of forward and backward passes. `one weight` is the largest gradient of a parameter, and in layers the largest
effective weight, which exist for a moment."""
UPDATE = ("joined gradients", "Muon's exchange and Newton-Schulz")
"""Kinds of the reduction and the update after the last backward pass."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, by kind; kinds of 0 bytes are left out."""

    by_kind: Mapping[str, int]

    def __str__(self) -> str:
        """Return what a rank needs in one line: at its peak, what it keeps, and what is there for a while."""
        parts = [
            f"{words} {screen.size(self.of(kinds))} ({', '.join(self._said(kinds))})"
            for words, kinds in (("kept", KEPT), ("forward and backward", PASSES), ("update", UPDATE))
            if self.of(kinds)
        ]
        return f"{screen.size(self.peak)} per rank: {'; '.join(parts)}"

    def _said(self, kinds: tuple[str, ...]) -> list[str]:
        return [f"{kind} {screen.size(self.by_kind[kind])}" for kind in kinds if self.by_kind.get(kind)]

    def of(self, kinds: tuple[str, ...]) -> int:
        """Return the bytes of some kinds together."""
        return sum(self.by_kind.get(kind, 0) for kind in kinds)

    @property
    def peak(self) -> int:
        """Bytes of everything in the phase that needs most."""
        return self.of(KEPT) + max(self.of(PASSES), self.of(UPDATE))


KINDS = (*KEPT, *PASSES, *UPDATE)
"""All kinds, in the order in which they are told."""


def memory_of(
    config: Config,
    vocab_size: int,
    partition: Partition,
    optimizer: TwoPhaseOptimizer,
    zero: Mapping[str, Any],
    cuda: bool,
) -> Memory:
    """Return the memory of a rank.

    Args:
        config: configuration of the run.
        vocab_size: exact number of tokens, without padding.
        partition: partition of the rank.
        optimizer: optimizer whose rules are bound to the partition.
        zero: the section `zero_optimization` of the DeepSpeed configuration.
        cuda: whether the run computes on CUDA GPUs.
    """
    accumulation = config.accumulation(partition.mesh.size_of("data"))
    return Memory(
        kept_memory(config, partition, optimizer, accumulation)
        | passing_memory(config, vocab_size, partition, zero, cuda)
        | update_memory(config, partition, optimizer, zero)
    )


def forward_pass(config: Config, cuda: bool) -> Pass:
    """Return what the memory of a forward pass depends on."""
    train, parallel = config.train, config.parallel
    return Pass(
        train.micro_batch_size,
        config.model.seq_length,
        train.torch_dtype,
        parallel.tensor,
        parallel.sequence,
        fused=cuda,
        documents=config.data.document_mask,
    )


def saved_by(config: Config, vocab_size: int, cuda: bool) -> Saved:
    """Return what the forward pass of a micro-batch keeps for backward."""
    in_layers = config.multipliers.implementation == "layer"
    sides = config.multipliers.sides(ROLES).get("embedding", frozenset()) if in_layers else frozenset()
    run = forward_pass(config, cuda)
    return architecture_of(config.model).activation_memory(config.model, vocab_size, run, frozenset(sides))


def kept_memory(
    config: Config, partition: Partition, optimizer: TwoPhaseOptimizer, accumulation: int
) -> dict[str, int]:
    """Return the bytes that a rank keeps from the first step on, by kind.

    Args:
        config: configuration of the run.
        partition: partition of the rank.
        optimizer: optimizer whose rules are bound to the partition.
        accumulation: number of micro-batches of a step.
    """
    train, stage = config.train, config.parallel.zero_stage
    state = state_by_name(optimizer, partition)
    moments = sum(state.pop(name, 0) for name in _MOMENTS)
    folded = state.pop(FOLDED, 0)
    found = {
        "weights": zero_memory.weight_bytes(partition),
        "fp32 masters": zero_memory.master_bytes(partition),
        "gradients": zero_memory.gradient_bytes(partition, stage, train.accumulation_dtype, train.dtype, accumulation),
        "moments": moments,
        "momentum": sum(state.values()),  # with NorMuon's second moments of rows
        FOLDED: folded,
        "fp32 multipliers": zero_memory.full_precision_bytes(partition),
    }
    return {kind: size for kind, size in found.items() if size}


def passing_memory(
    config: Config, vocab_size: int, partition: Partition, zero: Mapping[str, Any], cuda: bool
) -> dict[str, int]:
    """Return the bytes that forward and backward passes need beside what a rank keeps, by kind.

    Args:
        config: configuration of the run.
        vocab_size: exact number of tokens, without padding.
        partition: partition of the rank.
        zero: the section `zero_optimization` of the DeepSpeed configuration.
        cuda: whether the run computes on CUDA GPUs.
    """
    train, stage = config.train, config.parallel.zero_stage
    in_layers = config.multipliers.implementation == "layer"
    saved = saved_by(config, vocab_size, cuda)
    recompute = train.recompute == "full"
    largest = zero_memory.largest_bytes(partition)
    found = {
        "activations": saved.activations(recompute),
        "logits or recomputed layer": saved.working(recompute),
        "one weight": largest * (2 if in_layers else 1),
        "gathered parameters": zero_memory.gathered_bytes(partition, zero)
        if isinstance(partition, Zero3Partition)
        else 0,
        "buckets": zero_memory.reduction_bytes(partition, stage, train.accumulation_dtype, zero) if stage > 1 else 0,
    }
    return {kind: size for kind, size in found.items() if size}


def update_memory(
    config: Config, partition: Partition, optimizer: TwoPhaseOptimizer, zero: Mapping[str, Any]
) -> dict[str, int]:
    """Return the bytes that the reduction and the update after the last backward pass need beside what a rank keeps.

    Args:
        config: configuration of the run.
        partition: partition of the rank.
        optimizer: optimizer whose rules are bound to the partition.
        zero: the section `zero_optimization` of the DeepSpeed configuration.
    """
    stage, summed = config.parallel.zero_stage, config.train.accumulation_dtype
    joined = zero_memory.reduction_bytes(partition, stage, summed, zero) if stage < 2 else 0
    found = {
        "joined gradients": max(joined, zero_memory.flattened_bytes(partition, summed)),
        "Muon's exchange and Newton-Schulz": sum(
            int(rule.plan.temporary.max()) * exchanged_size(rule)
            for rule in matrix_rules(optimizer)
            if rule.plan is not None and rule.plan.matrices
        ),
    }
    return {kind: size for kind, size in found.items() if size}


def matrix_rules(optimizer: TwoPhaseOptimizer) -> list[MatrixRule]:
    """Return the rules that need whole matrices, such as Muon's."""
    return [rule for rule in optimizer.rules.values() if isinstance(rule, MatrixRule)]


def exchanged_size(rule: MatrixRule) -> int:
    """Return the bytes of an element that a rule exchanges."""
    assert rule.matrices is not None
    return (rule.exchange_dtype or rule.matrices.dtype or torch.float32).itemsize
