"""Work of the processes of test_startup.py: what the summary estimates, and what a step has really allocated."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from examples.benchmarks.saved_storages import saved_storages
from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.parameters import full_precision
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_config import deepspeed_config
from megamult.train.deepspeed_engine import DeepSpeedEngine
from megamult.train.planning.estimate import sharded
from megamult.train.planning.memory import memory_of
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


def total(*tensors: Tensor) -> int:
    """Bytes of the storages, each of which counts once."""
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in tensors}.values())


def masters(zero: Any) -> list[Tensor]:
    """The fp32 masters where DeepSpeed's optimizer keeps them; none if it wraps none."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return [each for group in getattr(zero, "fp32_groups", []) for each in group]


def gradients(zero: Any, model: torch.nn.Module, stage: int) -> int:
    """Bytes of gradients at the end of a micro-batch, where DeepSpeed keeps them."""
    of_parameters = [g for p in model.parameters() for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
    if stage == 3:
        return total(zero.grad_partitions_flat_buffer)
    if hasattr(zero, "fp32_groups_gradients_flat"):
        return total(*zero.fp32_groups_gradients_flat)
    summed = [each for group in getattr(zero, "averaged_gradients", {}).values() for each in group or ()]
    return total(*of_parameters, *summed)


def activations(engine: DeepSpeedEngine, tokens: Tensor, labels: Tensor) -> int:
    """Return the bytes that the forward pass of one micro-batch keeps for backward."""
    with saved_storages(engine.model) as storages:
        engine.deepspeed(tokens, labels)
    return sum(storages.values())


def multipliers(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the multipliers that forward passes read in fp32 beside the model's own."""
    return [p for p in model.parameters() if full_precision(p) is not p]


def planned(config: Config) -> dict[str, int]:
    """Return the plan of the same run, made without its processes, by kind."""
    held = sharded(config, model_specs(config, VOCAB), torch.distributed.get_world_size(), cuda=False)
    zero = deepspeed_config(config, held.grid.data).get("zero_optimization", {})
    return dict(memory_of(config, VOCAB, held.partition, held.optimizer, zero, cuda=False).by_kind)


def held_and_estimated(cases: list[tuple[Any, ...]]) -> list[tuple[dict[str, int], dict[str, int], dict[str, int]]]:
    """Return (bytes that this rank's DeepSpeed and optimizer hold by kind, the summary's estimate, the plan's) for each
    case."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.startup import memory

    mesh, rank, found = start.initialize(1), torch.distributed.get_rank(), []
    for case in cases:
        stage = case[0]
        engine = build(config_of(*case), VOCAB, mesh)
        estimated = memory(config_of(*case), VOCAB, engine).by_kind
        zero, peak = engine.deepspeed.optimizer, [0]

        def noted(step: Any, zero: Any = zero, engine: Any = engine, peak: list[int] = peak, stage: int = stage) -> Any:
            def after_backward(*args: Any) -> Any:
                peak[0] = max(peak[0], gradients(zero, engine.model, stage))
                return step(*args)

            return after_backward

        generator = torch.Generator().manual_seed(rank)
        texts = [torch.randint(0, VOCAB, (1, SMALL.seq_length + 1), generator=generator) for _ in range(MICRO_BATCHES)]
        batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in texts]
        saved = activations(engine, *batches[0])
        with mock.patch.object(engine.deepspeed, "step", noted(engine.deepspeed.step)):
            engine.train_batch(iter(batches), MICRO_BATCHES)
        optimizer = engine.optimizer
        state = [each for kept in optimizer.state.values() for each in kept.values() if isinstance(each, Tensor)]
        state += [values for *_, values in optimizer._store.all_rows()]
        if optimizer.folded is not None:
            state += [*optimizer.folded.state_dict().values(), optimizer.folded.gradient]
        weights = [getattr(p, "ds_tensor", p.data) for p in engine.model.parameters()]
        parts = {
            "weights": total(*weights),
            "fp32 masters": total(*masters(zero)),
            "gradients": peak[0],
            "state": total(*(s for s in state if s.numel() > 1)),
            "fp32 multipliers": total(*(full_precision(p) for p in multipliers(engine.model))),
            "activations and logits": saved,
        }
        largest = mesh.max_over(torch.tensor(list(parts.values()), dtype=torch.float64)).tolist()
        found.append((dict(zip(parts, map(int, largest), strict=True)), estimated, planned(config_of(*case))))
        engine.deepspeed.destroy()
    return found
