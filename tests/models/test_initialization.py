"""Each rank draws what it holds and no more, whatever the layout, and nothing where a checkpoint will be loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megamult.models.common import draw
from megamult.models.common.initialization import initialize
from megamult.multipliers.config import MultipliersConfig
from megamult.multipliers.merge import LEAVES
from megamult.multipliers.parameters import FULL_PRECISION
from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard
from megamult.parameters.stated import set_spec
from tests.invariance import Case
from tests.processes import run_distributed
from tests.small import VOCAB

CASES = [
    Case(world=4, tensor=tensor, zero=zero, dtype=dtype)
    for tensor, zero, dtype in [
        (1, 3, "fp32"),  # first: zero.Init casts tensors that are made under it, a table for draws among them
        (1, 0, "fp32"),
        (2, 1, "fp32"),
        (2, 3, "fp32"),
        (4, 2, "fp32"),
        (2, 3, "bf16"),
        (4, 0, "bf16"),
    ]
]


def pieces(engine: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """(name, global shape, offsets, values) of this rank's part of every logical tensor of the model."""
    from megamult.checkpoint.state import held

    chunks = held(engine.partition, engine.optimizer)
    return [
        (chunk.name.removeprefix("model."), chunk.shape, chunk.offsets, chunk.load().clone().view(chunk.sizes))
        for chunk in chunks
        if chunk.name.startswith("model.")
    ]


def builds() -> list[dict[str, Any]]:
    """For each case: this rank's pieces, how many numbers it drew, and what it was noted to do; and the same where a
    checkpoint is to be loaded."""
    from megamult.distributed import start
    from megamult.distributed.mesh import current_mesh
    from megamult.train.deepspeed_engine import build

    found = []
    for case in CASES:
        outcome: dict[str, Any] = {}
        for what in ("drawn", "to be loaded"):
            noted: list[str] = []
            with (
                mock.patch.object(draw, "fill_normal", wraps=draw.fill_normal) as fill,
                mock.patch.object(torch, "normal", side_effect=AssertionError("a tensor is drawn whole")),
            ):
                engine = build(
                    case.config(), VOCAB, start.initialize(case.tensor), draw=what == "drawn", note=noted.append
                )
            outcome[what] = {
                "pieces": pieces(engine),
                "numbers": sum(call.args[0].numel() for call in fill.call_args_list),
                "noted": noted,
                "padding": [
                    p.detach()[max(0, VOCAB - current_mesh().groups["tensor"].rank() * len(p)) :].abs().sum().item()
                    for name, p in engine.model.named_parameters()
                    if name in ("embedding.word_embeddings.weight", "output_layer.weight") and case.zero != 3
                ],
            }
            engine.deepspeed.destroy()
        found.append(outcome)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    """What each rank found, by rank and case."""
    return run_distributed(4, builds)


def expected(case: Case, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole logical tensor."""
    if len(shape) == 1:
        return torch.ones(shape)
    config = case.config()
    into_stream = "linear_proj" in name or "linear_fc2" in name
    std = config.model.init_std / (math.sqrt(2 * config.model.num_layers) if into_stream else 1)
    whole = torch.empty(shape)
    draw.fill_normal(whole, std, draw.key(config.train.seed, name), 0, 0, shape[1])
    return whole if config.train.dtype == "fp32" else whole.bfloat16().float()


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"tp{CASES[i].tensor} zero{CASES[i].zero}")
def test_every_layout_starts_from_the_same_elements_bitwise(ranks: list[list[dict[str, Any]]], index: int) -> None:
    case, seen = CASES[index], {}
    for found in ranks:
        for name, shape, offsets, values in found[index]["drawn"]["pieces"]:
            whole = seen.setdefault(name, (expected(case, name, shape), torch.zeros(shape, dtype=torch.bool)))
            place = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            assert torch.equal(values, whole[0][place]), (name, offsets)
            whole[1][place] = True
    assert len(seen) > 30 and all(covered.all() for _, covered in seen.values())


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"tp{CASES[i].tensor} zero{CASES[i].zero}")
def test_a_rank_draws_the_elements_that_it_holds_and_no_others(ranks: list[list[dict[str, Any]]], index: int) -> None:
    case = CASES[index]
    everything = [piece for found in ranks for piece in found[index]["drawn"]["pieces"]]
    shapes = {name: shape for name, shape, _, _ in everything if len(shape) == 2}
    model = sum(math.prod(shape) for shape in shapes.values())
    numbers = [found[index]["drawn"]["numbers"] for found in ranks]
    # Tensor-parallel shards are disjoint; data-parallel ranks hold them whole, or at ZeRO 3 a part each.
    assert sum(numbers) == model * (1 if case.zero == 3 else case.world // case.tensor)
    for found in ranks:
        noted = found[index]["drawn"]["noted"]
        assert sum("drawing decoder" in each for each in noted) == 4 * case.config().model.num_layers
        assert "drawing output_layer.weight" in noted


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"tp{CASES[i].tensor} zero{CASES[i].zero}")
def test_a_model_that_waits_for_a_checkpoint_draws_nothing_and_shows_what_stays_undefined(
    ranks: list[list[dict[str, Any]]], index: int
) -> None:
    for found in ranks:
        waiting = found[index]["to be loaded"]
        assert waiting["numbers"] == 0
        for name, shape, _, values in waiting["pieces"]:
            if len(shape) == 2:
                assert values.isnan().all(), name
            else:
                assert (values == 1).all(), name
        assert any(name.rpartition(".")[2] in LEAVES.values() for name, *_ in waiting["pieces"])
        # No checkpoint brings it.
        assert all(total == 0 for what in ("drawn", "to be loaded") for total in found[index][what]["padding"])


START = {"q": {"row": 0.3, "col": 1.7}, "k": {"row": 0.7}, "down": {"row": 1.1}}
"""Initial multipliers that are no bf16 numbers."""


def bf16_multipliers() -> list[dict[tuple[str, int], tuple[float, float]]]:
    """Masters of the multipliers of bf16 runs, and the fp32 values that forward passes use, by parameter and row."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    found = []
    for zero in (1, 3):
        case = Case(world=2, tensor=1, zero=zero, dtype="bf16")
        config = dataclasses.replace(case.config(), multipliers=MultipliersConfig(initial=START))
        engine = build(config, VOCAB, start.initialize(1))
        seen: dict[tuple[str, int], tuple[float, float]] = {}
        for piece in engine.partition.slices:
            if piece.spec.side is not None and piece.name.startswith("decoder.layers.0."):
                whole = getattr(engine.partition.parameters[piece.name], FULL_PRECISION).flatten().tolist()
                rows = enumerate(piece.master.tolist(), piece.start)
                seen |= {(piece.name, row): (value, whole[row]) for row, value in rows}
        found.append(seen)
        engine.deepspeed.destroy()
    return found


def test_multipliers_of_a_bf16_run_start_at_the_values_that_weights_were_divided_by() -> None:
    ranks = run_distributed(2, bf16_multipliers)
    query, down = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.linear_fc2"
    for one, other in zip(*ranks, strict=True):
        found = one | other
        for name, values in (
            (f"{query}.row_multiplier", {0.3, 0.7, 1.0}),
            (f"{query}.col_multiplier", {1.7, 1.0}),
            (f"{down}.row_multiplier", {1.1}),
        ):
            exact = {torch.tensor(value, dtype=torch.float32).item() for value in values}
            masters, used = zip(*(pair for (of, _), pair in found.items() if of == name), strict=True)
            assert set(masters) == exact and masters == used, name


def left_undefined() -> str:
    """What loading says that did not reach one element."""
    from megamult.checkpoint.resume import _check_defined
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    engine = build(Case(world=1).config(), VOCAB, start.initialize(1), draw=True)
    _check_defined(engine.partition)
    piece = next(piece for piece in engine.partition.slices if piece.name.endswith("linear_fc2.weight"))
    piece.source[-1] = math.nan
    with pytest.raises(ValueError, match="1 parameters are NaN after the checkpoint was loaded, the first is") as said:
        _check_defined(engine.partition)
    return str(said.value)


def test_an_element_that_a_checkpoint_left_undefined_is_an_error_by_name() -> None:
    assert "decoder.layers.0.mlp.linear_fc2.weight" in run_distributed(1, left_undefined)[0]


@pytest.mark.parametrize("kept", ["quantized", "twice"])
def test_a_partition_that_deepspeed_keeps_quantized_or_twice_is_refused(kept: str) -> None:
    weight: Any = torch.nn.Parameter(torch.zeros(0))
    weight.ds_tensor = torch.zeros(8, dtype=torch.int8 if kept == "quantized" else torch.float32)
    weight.ds_secondary_tensor = torch.zeros(8) if kept == "twice" else None
    set_spec(weight, megatron.single_matrix("down", 4, 4, 1))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    with pytest.raises(ValueError, match=r"keeps weight quantized, or keeps a second partition .*; remove zero_"):
        initialize(model, {"down": 0.1}, 1, tensor_shard(0, 1))
