"""Estimate of a run on a cluster: memory by kind, bytes on the wire, time of a step, MFU.

The time of a step is the sum of what no other part hides::

    compute      FLOPs of forward and backward (and of layers that are recomputed) / (peak x efficiency)
    tensor       bytes of tensor-parallel collectives / ring rate; nothing hides them
    data         bytes of ZeRO's collectives / ring rate, less what runs under backward (ZeRO 2), or under forward and
                 backward (ZeRO 3): megamult.zero.traffic.waited
    update       Newton-Schulz on the busiest rank and Muon's exchange, of which the longer hides the shorter but for
                 its first bucket

It leaves out what is small beside these: updates element by element, the data loader, latencies, and stragglers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megamult.config import Config
from megamult.models.architectures import architecture_of
from megamult.models.common.vocabulary import padded_vocab_size
from megamult.optim.build import make_optimizer
from megamult.optim.muon.rule import Muon
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.axes import Coordinates, Grid
from megamult.parameters.spec import ParameterSpec
from megamult.train.deepspeed_config import deepspeed_config
from megamult.train.planning.cluster import Cluster
from megamult.train.planning.memory import (
    Memory,
    forward_pass,
    kept_memory,
    matrix_rules,
    passing_memory,
    update_memory,
)
from megamult.train.planning.traffic import GRADIENTS, MUON, PARAMETERS, TENSOR, traffic
from megamult.zero.partition import Partition
from megamult.zero.planned import PlannedModel, planned_mesh, planned_partition
from megamult.zero.traffic import waited

PARTS = ("forward and backward", "recomputation", "tensor parallel", "waiting for ZeRO", "Muon")
"""Parts of the time of a step."""


@dataclass(frozen=True)
class Sharded:
    """What the first rank of a sharded run holds, on the meta device."""

    grid: Grid
    partition: Partition
    optimizer: TwoPhaseOptimizer
    kept: dict[bool, dict[str, int]] = field(default_factory=dict)
    """What the rank keeps, by kind, without and with accumulation. It is computed when it is asked for."""

    def keeps(self, config: Config) -> dict[str, int]:
        """Return the bytes that the rank keeps, by kind."""
        accumulation = config.accumulation(self.grid.data)
        if (accumulation > 1) not in self.kept:
            self.kept[accumulation > 1] = kept_memory(config, self.partition, self.optimizer, accumulation)
        return self.kept[accumulation > 1]


@dataclass(frozen=True)
class Estimate:
    """Estimate of one sharding."""

    config: Config
    grid: Grid
    memory: Memory
    traffic: Mapping[str, float]
    """Bytes that a rank sends per step, by kind."""
    seconds: Mapping[str, float]
    """Seconds of a step by :data:`PARTS`."""
    newton_schulz: tuple[float, float] | None
    """FLOPs of Newton-Schulz per step on the busiest rank and on the mean rank; None without Muon."""
    mfu: float
    """Share of the peak rate that the model's FLOPs take, without recomputation."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.config.train.global_batch_size * self.config.model.seq_length / self.step


def sharded(config: Config, specs: Mapping[str, ParameterSpec], ranks: int, cuda: bool) -> Sharded:
    """Return what the first rank of a run of `ranks` processes would hold.

    Args:
        config: configuration of the run.
        specs: specs of all parameters, by name (:func:`megamult.train.planning.specs.model_specs`).
        ranks: number of processes.
        cuda: whether the run computes on CUDA GPUs, where Newton-Schulz has a kernel for symmetric products.
    """
    train, tensor = config.train, config.parallel.tensor
    grid = Grid(tensor=tensor, data=ranks // tensor)
    mesh = planned_mesh(Coordinates(grid))
    model = PlannedModel(specs, tensor, train.torch_dtype)
    multipliers = dataclasses.replace(config.multipliers, qk_clip=None)  # it reads activations, which are not planned
    optimizer = make_optimizer(model, config.optimizer, multipliers, mesh=mesh)
    partition = planned_partition(
        model, optimizer.param_groups, mesh, config.parallel.zero_stage, train.torch_accumulation_dtype
    )
    for rule in matrix_rules(optimizer):
        if isinstance(rule, Muon):
            costs = partial(rule.fixed_costs, kernel=cuda)
            rule.plan_only(partition, lambda spec, rule=rule: optimizer.rule_of(spec.kind) is rule, costs)  # type: ignore[misc]
    return Sharded(grid, partition, optimizer)


def estimate(
    config: Config, vocab_size: int, specs: Mapping[str, ParameterSpec], held: Sharded, cluster: Cluster
) -> Estimate:
    """Return the estimate of a run.

    Args:
        config: configuration of the run; its sharding is that of `held`.
        vocab_size: exact number of tokens, without padding.
        specs: specs of all parameters, by name.
        held: what the first rank holds.
        cluster: the cluster.
    """
    grid, partition, optimizer = held.grid, held.partition, held.optimizer
    zero = deepspeed_config(config, grid.data, cluster.cuda).get("zero_optimization", {})
    memory = Memory(
        held.keeps(config)
        | passing_memory(config, vocab_size, partition, zero, cluster.cuda)
        | update_memory(config, partition, optimizer, zero)
    )
    sent = traffic(config, specs, partition, forward_pass(config, cluster.cuda), optimizer)
    loads = [rule.plan.loads for rule in matrix_rules(optimizer) if rule.plan is not None and rule.plan.matrices]
    busiest = (float(sum(each.max() for each in loads)), float(sum(each.mean() for each in loads))) if loads else None
    seconds = _seconds(config, vocab_size, held, cluster, sent, zero)
    tokens = config.train.global_batch_size * config.model.seq_length
    flops = architecture_of(config.model).flops_per_token(config.model, vocab_size) * tokens
    mfu = flops / (sum(seconds.values()) * cluster.peak * 1e12 * grid.size)
    return Estimate(config, grid, memory, sent, seconds, busiest, mfu)


def _seconds(
    config: Config,
    vocab_size: int,
    held: Sharded,
    cluster: Cluster,
    sent: Mapping[str, float],
    zero: Mapping[str, Any],
) -> dict[str, float]:
    """Return the seconds of a step by :data:`PARTS`."""
    grid, sizes = held.grid, config.model
    accumulation = config.accumulation(grid.data)
    tokens = config.train.micro_batch_size * sizes.seq_length / grid.tensor  # that a rank computes, in a micro-batch
    flops = architecture_of(sizes).flops_per_token(sizes, vocab_size)
    forward = flops / 3 * tokens / cluster.flops
    again = 0.0
    if config.train.recompute == "full":
        again = (flops / 3 - 2 * sizes.hidden_size * padded_vocab_size(vocab_size)) * tokens / cluster.flops
    reduction, gathering = (sent[kind] / cluster.ring(grid, "data") for kind in (GRADIENTS, PARAMETERS))
    # Without CUDA nothing runs beside the passes. DeepSpeed's overlap_comm decides whether reductions do; the gathers
    # of ZeRO 3 are asynchronous in any case.
    beside = reduction if cluster.cuda and zero.get("overlap_comm") else 0.0
    waiting = (reduction - beside) + waited(
        config.parallel.zero_stage,
        accumulation,
        beside,
        gathering,
        forward if cluster.cuda else 0.0,
        2 * forward + again if cluster.cuda else 0.0,
    )
    plans = [rule.plan for rule in matrix_rules(held.optimizer) if rule.plan is not None]
    work = sum(float(plan.loads.max(initial=0)) for plan in plans) / cluster.flops
    exchange = sent[MUON] / cluster.pairwise  # of all rules
    update = max(work, exchange) + min(work, exchange) / max(1, sum(len(plan.buckets) for plan in plans))
    transfer = sent[TENSOR] / cluster.ring(grid, "tensor")
    values = (accumulation * 3 * forward, accumulation * again, transfer, waiting, update)
    return dict(zip(PARTS, values, strict=True))
