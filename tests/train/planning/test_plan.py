"""A plan's bytes against those of processes and of counts by hand, the times by their formulas, the search's choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.models.common.activation_memory import Pass
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.axes import Grid
from megamult.parameters.spec import ParameterSpec
from megamult.train.config import TrainConfig
from megamult.train.planning.cluster import Cluster
from megamult.train.planning.estimate import Estimate, estimate, sharded
from megamult.train.planning.search import search, shardings
from megamult.train.planning.specs import model_specs
from megamult.train.planning.traffic import GRADIENTS, MUON, PARAMETERS, TENSOR, tensor_parallel_bytes
from tests.processes import run_distributed
from tests.small import MODELS, SMALL, VOCAB
from tests.train.planning.workers import held, sent

PADDED = 256


def config_of(model: Any = SMALL, name: str = "adamw", implementation: Any = "none", **train: Any) -> Config:
    parallel = {key: train.pop(key) for key in ("tensor", "sequence", "zero_stage") if key in train}
    settings = {"steps": 1, "global_batch_size": 16, "micro_batch_size": 2, **train}
    return Config(
        model=model,
        multipliers=MultipliersConfig(implementation),
        optimizer=OptimizerConfig.of({"name": name}),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(**settings),
    )


CLUSTER = Cluster(nodes=2, gpus_per_node=4, memory=1.0, peak=100.0, within=400.0, between=50.0, efficiency=0.5)


def estimated(config: Config, cluster: Cluster = CLUSTER) -> Estimate:
    specs = model_specs(config, VOCAB)
    return estimate(config, VOCAB, specs, sharded(config, specs, cluster.ranks, cluster.cuda), cluster)


def by_hand() -> tuple[int, int]:
    """Elements of the small Llama's matrices, and of its vectors, from its sizes."""
    h, f, head, groups = 96, 132, 8, 2
    block = h * (96 + 2 * head * groups) + 96 * h + 3 * h * f
    return 2 * block + 2 * PADDED * h, 2 * 2 * h + h


def test_bytes_of_one_process_by_hand_and_by_its_tensors() -> None:
    config = config_of(zero_stage=0)
    made = estimated(config, dataclasses.replace(CLUSTER, nodes=1, gpus_per_node=1)).memory.by_kind
    elements = sum(by_hand())
    assert made["weights"] == made["gradients"] == 4 * elements
    assert made["moments"] == 8 * elements
    assert "fp32 masters" not in made
    tensors = run_distributed(
        1, held, dataclasses.replace(config, train=TrainConfig(steps=1, global_batch_size=2, micro_batch_size=2))
    )[0]
    assert (made["weights"], made["moments"]) == (tensors["parameters"], tensors["state"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_a_rank_in_bf16_by_hand(stage: int) -> None:
    """Tensor parallel 2, data parallel 4: matrices are halved, vectors are not."""
    made = estimated(config_of(dtype="bf16", zero_stage=stage, tensor=2)).memory.by_kind
    matrices, vectors = by_hand()
    elements = matrices // 2 + vectors
    assert made["weights"] == pytest.approx(2 * elements / (4 if stage == 3 else 1))
    assert made["fp32 masters"] == pytest.approx(4 * elements / 4, abs=64)  # padding of the groups
    assert made["gradients"] == pytest.approx(4 * elements / (1 if stage == 1 else 4), abs=64)
    assert made["moments"] == pytest.approx(8 * elements / 4, abs=128)


def test_folded_multipliers_and_muon_by_hand() -> None:
    made = estimated(config_of(name="muon", implementation="folded", dtype="bf16", zero_stage=2)).memory.by_kind
    matrices, vectors = by_hand()
    tables = 2 * PADDED * 96
    assert made["momentum"] == pytest.approx(4 * (matrices - tables) / 8, abs=64)
    assert made["moments"] == pytest.approx(8 * (tables + vectors) / 8, abs=128)
    # Every matrix but the head has row and column multipliers, each with its gradient and two moments.
    rows = 2 * (96 + 16 + 16 + 96 + 132 + 132 + 96) + VOCAB
    cols = 2 * (3 * 96 + 96 + 2 * 96 + 132) + 96
    weights = 4 * (matrices - tables // 2) / 8
    assert made["folded multipliers and weights"] == pytest.approx(weights + 16 * (rows + cols), abs=64)


def counted_sent(config: Config) -> float:
    train, parallel = config.train, config.parallel
    run = Pass(train.micro_batch_size, config.model.seq_length, train.torch_dtype, parallel.tensor, parallel.sequence)
    specs = model_specs(config, VOCAB)
    return 2 * tensor_parallel_bytes(specs, run, train.recompute == "full", config.model)


def test_tensor_parallel_ranks_send_what_is_counted() -> None:
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    one_group = dataclasses.replace(SMALL, num_query_groups=1)
    common: dict[str, Any] = {"tensor": 2, "global_batch_size": 4}
    cases = [
        config_of(**common),
        config_of(**common, sequence=True, dtype="bf16"),
        config_of(**common, recompute="full"),
        config_of(**common, sequence=True, recompute="full"),
        config_of(tied, **common),
        config_of(one_group, **common),
        config_of(one_group, **common, sequence=True, recompute="full"),
        config_of(dataclasses.replace(MODELS["hybrid"], ssm_norm="none"), **common),
    ]
    found = run_distributed(2, sent, cases)[0]
    # Not counted: gradients of vectors that are sums over the ranks, which travel once per step, after the passes.
    assert [counted_sent(each) for each in cases] == pytest.approx(found, rel=0.01)


def test_traffic_and_seconds_follow_from_the_formulas() -> None:
    config = config_of(name="muon", dtype="bf16", zero_stage=2, tensor=2)
    made = estimated(config)
    matrices, vectors = by_hand()
    elements, accumulation = matrices // 2 + vectors, 2
    assert made.traffic[GRADIENTS] == pytest.approx(2 * 3 / 4 * 4 * elements * accumulation)
    assert made.traffic[PARAMETERS] == pytest.approx(3 / 4 * 2 * elements)
    assert 0 < made.traffic[MUON] < 4 * matrices
    assert made.seconds["tensor parallel"] == pytest.approx(made.traffic[TENSOR] / 400e9)
    # Two of a data-parallel group's four ranks are in each node, so it has two adapters there. The model is so small
    # that a backward pass hides little of the reduction.
    reduction, gather = made.traffic[GRADIENTS] / 100e9, made.traffic[PARAMETERS] / 100e9
    backward = made.seconds["forward and backward"] * 2 / 3
    assert made.seconds["waiting for ZeRO"] == pytest.approx(max(0.0, reduction - backward) + gather)
    tokens = 16 * SMALL.seq_length
    per_token = made.mfu * made.step * 100e12 * 8 / tokens
    assert made.seconds["forward and backward"] == pytest.approx(per_token * tokens / 8 / 50e12)


def test_without_overlap_zero_3_waits_for_reductions_and_not_for_gathers() -> None:
    config = config_of(dtype="bf16", zero_stage=3, tensor=2)
    waits = dataclasses.replace(config, deepspeed={"zero_optimization": {"overlap_comm": False}})
    cluster = dataclasses.replace(CLUSTER, peak=0.01)  # so slow that the passes hide everything
    assert estimated(config, cluster).seconds["waiting for ZeRO"] == 0
    made = estimated(waits, cluster)
    assert made.seconds["waiting for ZeRO"] == pytest.approx(made.traffic[GRADIENTS] / 100e9)
    assert made.traffic[PARAMETERS] > 0


def test_a_group_over_nodes_uses_the_adapters_of_all_its_ranks_in_a_node() -> None:
    assert CLUSTER.ring(Grid(tensor=4, data=2), "tensor") == 400e9, "in one node"
    assert dataclasses.replace(CLUSTER, nodes=1).ring(Grid(data=4), "data") == 400e9
    for tensor, adapters in ((1, 4), (2, 2), (4, 1), (8, 1)):
        assert CLUSTER.ring(Grid(tensor=tensor, data=8 // tensor), "data") == adapters * 50e9
    assert CLUSTER.ring(Grid(tensor=8), "tensor") == 4 * 50e9
    # 6 GPUs in a node: the tensor-parallel group of ranks 4 to 7 has two in each of its nodes.
    assert dataclasses.replace(CLUSTER, gpus_per_node=6).ring(Grid(tensor=4, data=3), "tensor") == 2 * 50e9
    assert dataclasses.replace(CLUSTER, within=120.0).ring(Grid(data=8), "data") == 120e9
    assert CLUSTER.pairwise == 50e9, "Muon's exchange is no ring"


def test_the_search_tries_what_heads_batch_and_keys_allow() -> None:
    found = list(shardings(config_of(dtype="bf16"), CLUSTER))
    # 12 heads and 2 groups allow 1, 2 and 4; sequence parallelism needs more than one rank; ZeRO 0 in bf16 needs sums
    # in bf16. 16 sequences on 8, 4 and 2 data-parallel ranks are 2, 4 and 8 of each.
    expected = sum(3 * 2 * micro_batches * ways for micro_batches, ways in ((2, 1), (3, 2), (4, 2)))
    assert len(found) == expected
    assert {each.parallel.tensor for each in found} == {1, 2, 4}


def best_by_hand(estimates: Sequence[Estimate], usable: float) -> Estimate:
    return min(
        (each for each in estimates if each.memory.peak <= usable), key=lambda each: (each.step, each.memory.peak)
    )


def test_the_best_is_the_shortest_step_of_all_that_fit_and_needs_less_where_there_is_less_memory() -> None:
    config = config_of(name="muon", dtype="bf16")
    specs: dict[str, ParameterSpec] = model_specs(config, VOCAB)
    all_of_them = [
        estimate(each, VOCAB, specs, sharded(each, specs, CLUSTER.ranks, True), CLUSTER)
        for each in shardings(config, CLUSTER)
    ]
    peaks = sorted(each.memory.peak for each in all_of_them)
    for usable in (peaks[-1], peaks[len(peaks) // 3], peaks[0]):
        cluster = dataclasses.replace(CLUSTER, memory=usable / 1e9, reserve=0.0)
        found = search(config, VOCAB, specs, cluster)
        assert found.best is not None
        expected = best_by_hand(all_of_them, cluster.usable)
        assert (found.best.step, found.best.memory.peak) == (expected.step, expected.memory.peak)
    too_small = search(config, VOCAB, specs, dataclasses.replace(CLUSTER, memory=peaks[0] / 2e9, reserve=0.0))
    assert too_small.best is None and too_small.smallest is not None
    assert too_small.smallest.memory.peak == peaks[0]


def test_a_large_run_takes_no_memory_to_plan() -> None:
    """70 billion parameters over 1,024 ranks: nothing is allocated but the specs and the plan of Muon's owners."""
    sizes = dataclasses.replace(
        SMALL, num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672
    )
    config = config_of(sizes, dtype="bf16", tensor=8, zero_stage=3, global_batch_size=256, micro_batch_size=1)
    made = estimated(config, Cluster(nodes=128))
    tensors = sharded(config, model_specs(config, VOCAB), 1024, True).partition.slices
    assert all(piece.tensor.device.type == "meta" for piece in tensors)
    assert made.memory.by_kind["fp32 masters"] == pytest.approx(4 * 68.5e9 / 1024, rel=0.01)
    assert made.memory.by_kind["weights"] == pytest.approx(2 * 68.5e9 / 1024, rel=0.01)
    assert torch.device("meta") != torch.empty(0).device, "tensors made later are real"
