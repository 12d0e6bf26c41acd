"""What the processes of test_muon.py do: Muon in loops without DeepSpeed, and what its exchange counts."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megamult.optim.muon.newton_schulz import flops
from megamult.parameters import megatron, spec
from megamult.parameters.stated import names_of, set_spec
from tests.optim.workers import StepCase, _batch
from tests.small import VOCAB

STEPS = 3


def chosen_methods(folder: Path, form: str) -> dict[tuple[int, int], tuple[str, str]] | str:
    """Form and products that this rank's Muon uses for two shapes, where each rank has kept other choices; or, if the
    form is `broken`, the beginning of the error message where rank 0 cannot time."""
    from unittest import mock

    from megamult.distributed import start
    from megamult.optim.muon import timing
    from megamult.optim.muon.newton_schulz import Method
    from megamult.optim.muon.rule import Muon

    mesh = start.initialize(1)
    os.environ["MEGAMULT_CACHE_DIR"] = str(folder / f"rank_{mesh.rank}")
    mine, other = Method("gram", "block_rows", False, torch.float32), Method("standard", "whole", True, torch.float32)
    kept = mine if mesh.rank == 0 else other
    muon: Any = Muon(ns_form="auto" if form == "broken" else form)  # type: ignore[arg-type]
    shapes = {(8, 6), (4, 6)}
    if form == "broken":
        broken = mock.patch.object(timing, "choose", side_effect=RuntimeError("no clock"))
        with broken:
            try:
                muon.choose_methods(shapes, torch.float32, mesh)
            except RuntimeError as error:
                return str(error)[:79]
    answer = timing.Chosen(kept, 1 + mesh.rank)
    timing.choose(sorted(shapes), muon._steps, [torch.float32], torch.device("cpu"), time_one=lambda *_: answer)
    cost = muon.choose_methods(shapes, torch.float32, mesh)
    expected = 10**9 if form == "auto" else flops(8, 6, 5, "standard")
    assert cost(8, 6) == expected, "a measured time, or FLOPs"
    return {shape: (method.form, method.products) for shape, method in muon.methods.items()}


def own_loop(tensor: int) -> dict[str, Tensor]:
    """Full parameters after steps of a training loop without DeepSpeed, gradients averaged by hand; on global rank 0.

    Every data-parallel rank must hold the same parameters: an assertion.
    """
    from megamult.distributed import start
    from megamult.distributed.mesh import current_mesh
    from megamult.train.deepspeed_engine import build_optimizer
    from megamult.train.model import build_model
    from megamult.zero.gather import gather
    from megamult.zero.whole import WholePartition

    mesh = start.initialize(tensor)
    config = StepCase(world=mesh.size, tensor=tensor, optimizer="muon").config()
    model = build_model(config, VOCAB, config.train.seed)
    optimizer = build_optimizer(config, model, mesh)
    data = current_mesh().groups["data"]
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
    partition = WholePartition(optimizer.param_groups, names, current_mesh())
    full = {name: value for name, _, _, value in gather(model, partition)}
    return full if torch.distributed.get_rank() == 0 else {}


def _world() -> int:
    from megamult.distributed import environment

    return environment.world_size()


class Routed(torch.nn.Module):
    """A router, which every tensor-parallel rank has whole, beside a sharded matrix and a norm.

    The objective's gradient is the one that `forward` is told: any number of processes knows the others' shards. Those
    of the router's other replicas are wrong: the first alone counts.
    """

    LAYOUTS: ClassVar = {
        "router": megatron.single_matrix("gate", 5, 24, None),
        "down": megatron.single_matrix("down", 24, 36, 1),
        "norm": megatron.norm(24, False),
    }

    def __init__(self, tensor: int, tp_rank: int) -> None:
        super().__init__()
        self.tensor, self.tp_rank = tensor, tp_rank
        for name, stated in self.LAYOUTS.items():
            parameter = torch.nn.Parameter(self._shard(stated, self._random(name, 0)))
            set_spec(parameter, stated)
            self.register_parameter(name, parameter)

    def _random(self, name: str, seed: int) -> Tensor:
        return torch.randn(self.LAYOUTS[name].shape, generator=torch.Generator().manual_seed(seed))

    def _shard(self, stated: spec.ParameterSpec, full: Tensor) -> Tensor:
        shards = (
            [full] * self.tensor
            if stated.dim_over("tensor") is None
            else full.chunk(self.tensor, stated.dim_over("tensor"))
        )
        return shards[self.tp_rank].contiguous()

    def forward(self, step: int, factor: float) -> Tensor:
        """Sum of parameters times their gradients of `step` times `factor`."""
        total = torch.zeros(())
        for name, parameter in self.named_parameters():
            gradient = self._shard(self.LAYOUTS[name], factor * self._random(name, 1 + step))
            wrong = 2 if name == "router" and self.tp_rank else 1
            total = total + (wrong * gradient * parameter).sum()
        return total


def routed(tensor: int, stages: list[int | None]) -> list[dict[str, Tensor]]:
    """Per ZeRO stage, or without DeepSpeed: full parameters after some steps, on global rank 0.

    Every process must have the same router, and sends what the plan says: assertions.
    """
    import deepspeed

    from megamult import DistributedMuon, param_groups
    from megamult.distributed import start
    from megamult.distributed.mesh import current_mesh
    from megamult.train.deepspeed_config import deepspeed_config
    from megamult.zero.attach import attach
    from megamult.zero.gather import gather
    from megamult.zero.whole import WholePartition

    mesh = start.initialize(tensor)
    found = []
    for stage in stages:
        model = Routed(tensor, mesh.rank_on("tensor"))
        groups = param_groups(model, lr=0.02, weight_decay=0.1)
        optimizer = DistributedMuon(groups, model=model, bucket_elements=1)
        if stage is None:
            forward, partition = model, WholePartition(optimizer.param_groups, names_of(model), current_mesh())
        else:
            settings = deepspeed_config(
                StepCase(world=mesh.size, tensor=tensor, zero=stage).config(), mesh.size_of("data")
            )
            with optimizer.paused():
                forward, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=settings, mpu=mesh.mpu, dist_init_required=False
                )
            partition = attach(forward, optimizer)
        for step in range(STEPS):
            # Data-parallel ranks have different gradients with the mean 1.
            objective = forward(step, 1 + 0.5 * (mesh.rank_on("data") - (mesh.size_of("data") - 1) / 2))
            if stage is None:
                optimizer.zero_grad()
                objective.backward()
                for parameter in model.parameters():
                    torch.distributed.all_reduce(parameter.grad, group=current_mesh().groups["data"])
                    parameter.grad /= mesh.size_of("data")
                optimizer.step()
            else:
                forward.backward(objective)
                forward.step()
        with deepspeed.zero.GatheredParameters([model.router], enabled=stage == 3):
            first = model.router.detach().clone()
        mine = first.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(mine, first), "replicas differ"
        if stage:  # at 0 there are all-gathers beside
            assert optimizer.plan is not None and len(optimizer.plan.buckets) == 2
            assert optimizer.bytes_sent == STEPS * 4 * optimizer.plan.sent[mesh.rank]
        found.append({name: value for name, _, _, value in gather(model, partition)})
        if stage is not None:
            forward.destroy()
    return found


def exchange_figures(cases: list[StepCase]) -> list[dict[str, Any]]:
    """Per case, of this rank: bytes that two steps sent and that the plan says; elements of momentum kept."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from tests.optim.workers import _step

    figures = []
    for case in cases:
        config = case.config()
        engine = build(config, VOCAB, start.initialize(case.tensor))
        optimizer: Any = engine.optimizer
        for step in range(2):
            _step(engine, config, step)
        buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
        muon = optimizer.rules["matrix"]
        assert optimizer.state_bytes["momentum"] == sum(4 * buffer.numel() for buffer in buffers)
        figures.append(
            {
                "sent": muon.bytes_sent,
                "planned": 2 * 4 * int(muon.plan.sent[torch.distributed.get_rank()]),
                "momentum": sum(buffer.numel() for buffer in buffers),
                "dtypes": {buffer.dtype for buffer in buffers},
                "matrices": sum(matrix.numel for matrix in muon.plan.matrices),
                "keys": {key for state in optimizer.state.values() for key in state if "momentum_buffer" in state},
                "norms": (optimizer.norms.main, engine.deepspeed.get_global_grad_norm()),
            }
        )
        engine.deepspeed.destroy()
    return figures


def two_processes(cases: list[StepCase]) -> dict[str, Any]:
    """All that needs two."""
    result: dict[str, Any] = {f"own loop, TP {tensor}": own_loop(tensor) for tensor in (1, 2)}
    result["figures"] = exchange_figures(cases)
    result["wrong maps"] = wrong_maps()
    result["automatic dtypes"] = automatic_dtypes()
    return result


def automatic_dtypes() -> dict[tuple[int, str], set[torch.dtype]]:
    """That Newton-Schulz computes and the pieces travel in where nothing is said, by ZeRO stage and model's dtype."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    found = {}
    for stage, dtype in itertools.product(range(4), ("fp32", "bf16")):
        engine = build(
            StepCase(world=2, zero=stage, dtype=dtype, optimizer="muon").config(), VOCAB, start.initialize(1)
        )
        muon: Any = engine.optimizer.rules["matrix"]
        ours = {method.dtype for method in muon.methods.values()}
        if dtype == "bf16":
            ours.discard(torch.float32)  # where it is faster, as on a CPU that only emulates bf16
        found[stage, dtype] = {*ours, muon.exchange_dtype}
        engine.deepspeed.destroy()
    return found


def wrong_maps() -> dict[str, str]:
    """Messages of the start-up check when two parameters of equal values and sizes are taken for one another."""
    from dataclasses import replace

    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    messages = {}
    for stage, dtype in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")):
        config = StepCase(world=2, zero=stage, dtype=dtype).config()
        engine = build(config, VOCAB, start.initialize(1))
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
