"""Work of the processes of test_startup.py: what the summary estimates, and what a step has really allocated."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch

from examples.benchmarks.plan_memory import measured, planned
from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.planning.estimate import sharded
from megamult.train.planning.specs import model_specs
from tests.small import SMALL, VOCAB

MICRO_BATCHES = 2


def config_of(stage: int, dtype: Any, summed: Any, name: str, implementation: Any) -> Config:
    return Config(
        model=SMALL,
        multipliers=MultipliersConfig(implementation),
        optimizer=OptimizerConfig.of({"name": name}),
        parallel=ParallelConfig(zero_stage=stage),
        train=TrainConfig(
            steps=1, global_batch_size=2 * MICRO_BATCHES, micro_batch_size=1, dtype=dtype, grad_accum_dtype=summed
        ),
    )


def held_and_estimated(cases: list[tuple[Any, ...]]) -> list[tuple[dict[str, int], dict[str, int], dict[str, int]]]:
    """Return (bytes that this rank's DeepSpeed and optimizer hold by kind, the summary's estimate, the plan's) for each
    case."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.startup import memory

    mesh, rank, found = start.initialize(1), torch.distributed.get_rank(), []
    for case in cases:
        config = config_of(*case)
        engine = build(config, VOCAB, mesh)
        estimated = dict(memory(config, VOCAB, engine).by_kind)
        generator = torch.Generator().manual_seed(rank)
        texts = [torch.randint(0, VOCAB, (1, SMALL.seq_length + 1), generator=generator) for _ in range(MICRO_BATCHES)]
        held = measured(engine, case[0], [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in texts])
        cuts = sharded(config, model_specs(config, VOCAB), mesh.size, cuda=False).partition.cuts
        held["cuts that the plan has otherwise"] = sum(
            ours != theirs for ours, theirs in zip_longest(cuts, engine.partition.cuts)
        )
        found.append((held, estimated, planned(config, VOCAB, mesh.size)))
        engine.deepspeed.destroy()
    return found
