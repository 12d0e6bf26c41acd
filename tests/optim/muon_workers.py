"""What the processes of test_muon.py do: Muon in loops without DeepSpeed, and what its exchange counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.optim.workers import VOCAB, Case, _batch

STEPS = 3


def own_loop(tensor: int) -> dict[str, Tensor]:
    """Full parameters after steps of a training loop without DeepSpeed, gradients averaged by hand; on global rank 0.

    Every data-parallel rank must hold the same parameters: an assertion.
    """
    from megamult import parallel
    from megamult.checkpoint.logical import gather
    from megamult.model.gpt import GPT
    from megamult.train.engine import build_optimizer
    from megamult.zero.whole import WholePartition

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else _world()
    parallel.initialize(tensor)
    config = Case(tensor=tensor, optimizer="muon").config(world)
    model = GPT(config, VOCAB, config.train.seed)
    optimizer = build_optimizer(config, model)
    data = parallel.data_group()
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*_batch(step, config))[0].backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad, group=data)
            parameter.grad /= data.size()
        optimizer.step()
    for parameter in model.parameters():
        mine = parameter.detach().clone()
        torch.distributed.broadcast(mine, group=data, group_src=0)
        assert torch.equal(mine, parameter), "data-parallel replicas differ"
    names = {parameter: name for name, parameter in model.named_parameters()}
    partition = WholePartition(optimizer.param_groups, names)
    full = {name: value for name, _, _, value in gather(model, partition)}
    return full if torch.distributed.get_rank() == 0 else {}


def _world() -> int:
    from megamult import environment

    return environment.world_size()


def exchange_figures(cases: list[Case]) -> list[dict[str, Any]]:
    """Per case, of this rank: bytes that two steps sent and that the plan says; elements of momentum kept."""
    from megamult import parallel
    from megamult.train.engine import build
    from tests.optim.workers import _step

    figures = []
    for case in cases:
        config = case.config(torch.distributed.get_world_size() if torch.distributed.is_initialized() else _world())
        engine = build(config, VOCAB, parallel.initialize(case.tensor))
        optimizer: Any = engine.optimizer
        for step in range(2):
            _step(engine, config, step)
        buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
        figures.append(
            {
                "sent": optimizer.bytes_sent,
                "planned": 2 * 4 * int(optimizer.plan.sent[torch.distributed.get_rank()]),
                "momentum": sum(buffer.numel() for buffer in buffers),
                "dtypes": {buffer.dtype for buffer in buffers},
                "matrices": sum(matrix.numel for matrix in optimizer.plan.matrices),
                "keys": {key for state in optimizer.state.values() for key in state if "momentum_buffer" in state},
                "norms": (optimizer.norms.main, engine.deepspeed.get_global_grad_norm()),
            }
        )
        engine.deepspeed.destroy()
    return figures


def two_processes(cases: list[Case]) -> dict[str, Any]:
    """All that needs two."""
    result: dict[str, Any] = {f"own loop, TP {tensor}": own_loop(tensor) for tensor in (1, 2)}
    result["figures"] = exchange_figures(cases)
    result["wrong maps"] = wrong_maps()
    return result


def wrong_maps() -> dict[str, str]:
    """Messages of the start-up check when two parameters of equal values and sizes are taken for one another."""
    from dataclasses import replace

    from megamult import parallel
    from megamult.train.engine import build

    messages = {}
    for stage, dtype in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")):
        config = Case(stage=stage, dtype=dtype).config(2)
        engine = build(config, VOCAB, parallel.initialize(1))
        partition = engine.partition
        partition.check()
        ones = [i for i, p in enumerate(partition.slices) if bool((p.master == 1).all())]
        pairs = [
            (i, j) for i in ones for j in ones if i < j and partition.slices[i].length == partition.slices[j].length
        ]
        first, other = pairs[0]
        a, b = partition.slices[first], partition.slices[other]
        partition.slices[first] = replace(a, tensor=b.tensor, offset=b.offset)
        partition.slices[other] = replace(b, tensor=a.tensor, offset=a.offset)
        try:
            partition.check()
            messages[f"{stage} {dtype}"] = ""
        except RuntimeError as error:
            messages[f"{stage} {dtype}"] = str(error)
        engine.deepspeed.destroy()
    return messages
