"""Search for the sharding of a run that takes the shortest step of all that fit into the cluster's memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megamult.config import Config
from megamult.models.common.vocabulary import VOCABULARY_MULTIPLE
from megamult.parameters.axes import Grid
from megamult.parameters.spec import ParameterSpec
from megamult.train.deepspeed_config import deepspeed_config
from megamult.train.planning.cluster import Cluster
from megamult.train.planning.estimate import Estimate, Sharded, estimate, sharded


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    best: Estimate | None
    """Estimate of the shortest step that fits; None if none fits."""
    smallest: Estimate | None
    """Estimate of the sharding that needs the least memory; None if the keys allow no sharding at all."""
    tried: int
    """Number of shardings that the keys allow."""
    fitting: int
    """Number of those that fit."""


def shardings(config: Config, cluster: Cluster) -> Iterator[Config]:
    """Yield the configuration with every tensor x sequence x ZeRO stage x micro-batch x recompute that its other keys,
    its heads and the cluster allow. Those with the same tensor-parallel size and ZeRO stage come together."""
    ranks = cluster.ranks
    tensors = [t for t in range(1, VOCABULARY_MULTIPLE + 1) if VOCABULARY_MULTIPLE % t == 0 and ranks % t == 0]
    for tensor, stage in itertools.product(tensors, (0, 1, 2, 3)):
        if cluster.gpus_per_node % tensor and not config.parallel.tensor_across_nodes:
            continue
        each = config.train.global_batch_size // (ranks // tensor)  # sequences of a rank and step
        recomputes: tuple[Literal["none", "full"], ...] = ("none", "full")
        for micro, sequence, recompute in itertools.product(_divisors(each), (False, True), recomputes):
            parallel = dataclasses.replace(config.parallel, tensor=tensor, sequence=sequence, zero_stage=stage)
            train = dataclasses.replace(config.train, micro_batch_size=micro, recompute=recompute)
            try:
                candidate = dataclasses.replace(config, parallel=parallel, train=train)
                candidate.check_world(ranks)
                deepspeed_config(candidate, ranks // tensor, cluster.cuda)
            except ValueError:  # the heads do not divide, or the batch, or a key of the user's contradicts it
                continue
            yield candidate


def search(config: Config, vocab_size: int, specs: Mapping[str, ParameterSpec], cluster: Cluster) -> Found:
    """Estimate all shardings, and return the best of those that fit.

    Args:
        config: configuration of the run, whose sharding does not matter.
        vocab_size: exact number of tokens, without padding.
        specs: specs of all parameters, by name.
        cluster: the cluster.
    """
    best: Estimate | None = None
    smallest: Estimate | None = None
    tried = fitting = 0
    for _, group in itertools.groupby(shardings(config, cluster), lambda c: (c.parallel.tensor, c.parallel.zero_stage)):
        held: Sharded | None = None
        for candidate in group:
            tried += 1
            # Planning takes seconds for a large run: leave it out where the weights alone are too much.
            least = math.inf if smallest is None else max(cluster.usable, smallest.memory.peak)
            if _weights(candidate, specs, cluster) > least:
                continue
            held = held or sharded(candidate, specs, cluster.ranks, cluster.cuda)
            made = estimate(candidate, vocab_size, specs, held, cluster)
            if smallest is None or made.memory.peak < smallest.memory.peak:
                smallest = made
            if made.memory.peak <= cluster.usable:
                fitting += 1
                if best is None or (made.step, made.memory.peak) < (best.step, best.memory.peak):
                    best = made
    return Found(best, smallest, tried, fitting)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _weights(config: Config, specs: Mapping[str, ParameterSpec], cluster: Cluster) -> float:
    """Return the bytes of a rank's weights."""
    parallel = config.parallel
    grid = Grid(tensor=parallel.tensor)
    elements = sum(math.prod(spec.local_shape(grid)) for spec in specs.values())
    parts = cluster.ranks // parallel.tensor if parallel.zero_stage == 3 else 1
    return elements * config.train.torch_dtype.itemsize / parts
