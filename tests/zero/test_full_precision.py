"""A bf16 model's forward passes scale by fp32 multipliers, which are the masters of every rank after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.workers import StepCase, _step
from tests.processes import run_distributed
from tests.small import VOCAB

CASES = [StepCase(world=2, zero=stage, dtype="bf16") for stage in range(4)]
CASES += [StepCase(world=2, tensor=2, sequence=True, zero=stage, dtype="bf16") for stage in (1, 3)]


def run(cases: list[StepCase], folder: Path) -> list[dict[str, Any]]:
    """What went wrong on this rank, as text, by case."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    outcomes = []
    for case in cases:
        config = case.config()
        engine = build(config, VOCAB, start.initialize(case.tensor))
        outcome = {"at the start": stale(engine)}
        for step in range(2):
            _step(engine, config, step)
        outcome["after two steps"] = stale(engine)
        if case.zero and case.tensor == 1:
            engine.deepspeed.save_checkpoint(f"{folder}/{case.zero}")
            _step(engine, config, 2)
            engine.deepspeed.load_checkpoint(f"{folder}/{case.zero}")
            outcome["after DeepSpeed's own load"] = stale(engine)
        outcome["in bf16"] = sum(moved_in_bf16(engine), torch.zeros(2))
        if case.zero == 1 and case.tensor == 1:
            outcome["weights"] = wrong_weights(engine.model)
        engine.deepspeed.destroy()
        outcomes.append(outcome)
    return outcomes


def stale(engine: Any) -> list[str]:
    """Multipliers whose value in a forward pass is not their fp32 master, bit by bit."""
    from megamult.multipliers.parameters import full_precision
    from megamult.parameters.axes import tensor_shard
    from megamult.parameters.stated import named_specs
    from megamult.zero.gather import trained

    masters = trained(engine.model, engine.partition, engine.optimizer, kinds=("multiplier",))
    whole = {item.name: item.tensor for item in masters}
    for tensor in whole.values():
        torch.distributed.broadcast(tensor, 0)
    tensor_group = engine.model.pg_collection.tp
    found = []
    for name, parameter, spec in named_specs(engine.model):
        if spec.kind != "multiplier":
            continue
        value = full_precision(parameter)
        for run in spec.local_segments(tensor_shard(tensor_group.rank(), tensor_group.size())):
            master = whole[spec.logical_name(name, spec.parts[run.part])]
            held = value[run.start : run.start + run.length]
            if not torch.equal(held, master[run.part_start : run.part_start + run.length]):
                found.append(f"{name} ({value.dtype})")
    return found


def moved_in_bf16(engine: Any) -> list[Tensor]:
    """[2] for each slice of multipliers: how many there are, and how many bf16 could not hold."""
    pieces = [piece for piece in engine.partition.slices if piece.spec.kind == "multiplier"]
    return [torch.tensor([p.length, int((p.master.bfloat16().float() != p.master).sum())]) for p in pieces]


@torch.no_grad()
def wrong_weights(model: Any) -> list[str]:
    """Layers that do not scale by their fp32 multipliers and round once."""
    from megamult.multipliers.parameters import full_precision
    from megamult.parameters.axes import tensor_shard
    from megamult.parameters.stated import spec_of

    found = []
    block = model.decoder.layers[0]
    layers = {
        "qkv": block.self_attention.linear_qkv,
        "proj": block.self_attention.linear_proj,
        "fc1": block.mlp.linear_fc1,
        "fc2": block.mlp.linear_fc2,
    }
    for name, layer in layers.items():
        rows, cols = layer.weight.shape
        effective = layer(torch.eye(cols, dtype=torch.bfloat16)[:, None])[0][:, 0].t()
        row, col = full_precision(layer.row_multiplier), full_precision(layer.col_multiplier).view(-1, cols)
        of_part = torch.empty(rows, dtype=torch.long)
        for run in spec_of(layer.weight).local_segments(tensor_shard(0, 1)):
            of_part[run.start : run.start + run.length] = run.part
        want = (layer.weight.float() * col[of_part] * row[:, None]).bfloat16()
        if not torch.equal(effective, want):
            found.append(name)
    table = model.embedding.word_embeddings
    ids = torch.arange(VOCAB)
    looked_up = (table.weight[ids].float() * full_precision(table.row_multiplier)[ids, None]).bfloat16()
    want = (looked_up.float() * full_precision(table.col_multiplier)).bfloat16()
    if not torch.equal(table(ids[None])[0], want):
        found.append("embedding")
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What `run` returns, by rank and case."""
    return run_distributed(2, run, CASES, tmp_path_factory.mktemp("deepspeed"), fast=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("when", ["at the start", "after two steps"])
def test_every_rank_scales_by_the_fp32_masters_of_its_multipliers(
    outcomes: list[list[dict[str, Any]]], case: StepCase, when: str
) -> None:
    assert [rank[CASES.index(case)][when] for rank in outcomes] == [[], []]


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_every_rank_scales_by_the_masters_that_deepspeed_has_loaded(
    outcomes: list[list[dict[str, Any]]], case: StepCase
) -> None:
    assert [rank[CASES.index(case)]["after DeepSpeed's own load"] for rank in outcomes] == [[], []]


def test_the_masters_are_not_what_bf16_could_hold(outcomes: list[list[dict[str, Any]]]) -> None:
    """Else the test above would show nothing: after two steps of 1e-2 hardly any multiplier is a bf16 number."""
    for rank in outcomes:
        for outcome in rank:
            held, beyond = outcome["in bf16"].tolist()
            assert beyond > held / 2


def test_effective_weights_and_embeddings_are_rounded_once_from_fp32_factors(
    outcomes: list[list[dict[str, Any]]],
) -> None:
    assert [rank[1]["weights"] for rank in outcomes] == [[], []]
