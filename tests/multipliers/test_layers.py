"""Every layer's output and gradients are the dense float64 layer's, in every cell of the table of who sums what."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor

from megamult.multipliers import specs
from megamult.multipliers.layer_scaling import LayerScaling
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from tests.multipliers import cases
from tests.multipliers.cases import CASES, Dense, LayerCase
from tests.multipliers.conftest import ByRank
from tests.multipliers.workers import COUNTED, FRESH, KEPT

TOLERANCE = 16 * 2**-24
"""fp32 against float64, relative to the sum of each result's |terms|. A term is a product of at most five fp32
numbers (4 roundings of 2^-24 at most, and one for each of W_eff's scalings on the way); a sum of up to 3000 such terms
is made of blocked partial sums, whose roundings grow as the square root of their number and add a few more. A missing
factor, row or summand is an error of order one on this scale."""


@functools.cache
def _dense(layer: str, placement: str) -> tuple[Dense, Dense]:
    data = cases.draw(LayerCase(layer, placement, 1, False, "step"))
    return cases.dense(data), cases.dense(data.magnitudes())


def wanted(case: LayerCase, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a rank should hold, by name as the worker names it, and the sums of its |terms|."""
    pair = []
    for whole in _dense(case.layer, case.placement):
        local = cases.shard(case, rank, whole, unused=0.0)
        local["y"] = cases.local_output(case, rank, whole.y)
        if whole.dx is not None:
            local["dx"] = cases.local_input(case, rank, whole.dx)
        pair.append(local)
    return pair[0], pair[1]


def assert_close(name: str, got: Tensor, want: Tensor, scale: Tensor) -> None:
    assert got.shape == want.shape, (name, got.shape, want.shape)
    error = (got.double() - want).abs()
    bound = TOLERANCE * scale
    # Written so that NaN fails. Where all terms are zero (padding, unused entries) the result is exactly zero.
    assert bool((error <= bound).all()), f"{name}: off by up to {(error / scale).nan_to_num(torch.inf).max():.2e}"


def multipliers_of(case: LayerCase) -> list[str]:
    return [f"{side}_multiplier" for side in ("row", "col", "scalar") if case.scaled(side)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_input_and_weight_gradients_are_the_dense_layers(by_rank: ByRank, case: LayerCase) -> None:
    for rank, outcome in enumerate(by_rank("gradients", case)):
        want, scale = wanted(case, rank)
        names = ["y", "weight"] + ["dx"] * (case.layer != "embedding")
        # The bias is added after scaling: its gradient is the output's sum, unscaled. Under sequence parallelism a
        # row-parallel layer's is partial in Megatron itself.
        names += ["bias"] * (case.has_bias and not (case.layer == "row" and case.sequence))
        for name in names:
            assert_close(name, outcome["results"][name], want[name], scale[name])


@pytest.mark.parametrize("case", [case for case in CASES if case.grad_sync == "backward"], ids=str)
def test_multiplier_gradients_are_complete_on_every_rank_after_backward(by_rank: ByRank, case: LayerCase) -> None:
    for rank, outcome in enumerate(by_rank("gradients", case)):
        want, scale = wanted(case, rank)
        assert not any(outcome["partial"].values()), "an optimizer would sum a complete gradient again"
        for name in multipliers_of(case):
            assert_close(name, outcome["results"][name], want[name], scale[name])


@pytest.mark.parametrize("case", [case for case in CASES if case.grad_sync == "step"], ids=str)
def test_multiplier_gradients_sum_to_the_dense_ones_where_the_layout_says_partial_and_are_complete_elsewhere(
    by_rank: ByRank, case: LayerCase
) -> None:
    outcomes = by_rank("gradients", case)
    for name in multipliers_of(case):
        shards = [outcome["results"][name] for outcome in outcomes]
        summed = torch.stack([shard.double() for shard in shards]).sum(0)
        for rank, outcome in enumerate(outcomes):
            want, scale = wanted(case, rank)
            got = summed if outcome["partial"][name] else shards[rank]
            assert_close(name, got, want[name], scale[name])


def states_partial(layer: str, side: str, tensor: int, sequence: bool) -> bool:
    """STACK.md's table for what is built: linear layers fold into the local weight; the embedding scales its rows
    before the reduce, and its columns and scalar after it."""
    if tensor == 1:
        return False
    if layer == "embedding":
        return side != "row" and sequence
    sharded_side = "col" if layer == "row" else "row"
    return side != sharded_side


@pytest.mark.parametrize("case", [case for case in CASES if case.grad_sync == "step"], ids=str)
def test_the_layout_states_partial_exactly_as_the_table_has_it(by_rank: ByRank, case: LayerCase) -> None:
    table = {
        f"{side}_multiplier": states_partial(case.layer, side, case.tensor, case.sequence)
        for side in ("row", "col", "scalar")
        if case.scaled(side)
    }
    for outcome in by_rank("gradients", case):
        assert outcome["partial"] == {"weight": False} | table


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_fresh_layer_computes_bitwise_what_megatrons_plain_layer_computes(by_rank: ByRank, case: LayerCase) -> None:
    assert by_rank("fresh", case) == [[]] * case.tensor


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_nothing_of_the_weights_size_is_kept_for_backward(by_rank: ByRank, case: LayerCase) -> None:
    for kept in by_rank("kept", case):
        assert all(size < kept["weight"] for size in kept["alive"]), kept  # inputs and outputs are smaller here


@pytest.mark.parametrize("case", [case for case in COUNTED if case.grad_sync == "step"], ids=str)
def test_multipliers_add_no_collective_when_the_optimizer_sums(by_rank: ByRank, case: LayerCase) -> None:
    for found in by_rank("collectives", case):
        assert found["plain"], "the plain layer communicates at tensor parallel 2: the count sees nothing"
        assert Counter(found["multipliers"]) == Counter(found["plain"])


@pytest.mark.parametrize("case", [case for case in COUNTED if case.grad_sync == "backward"], ids=str)
def test_multipliers_add_one_collective_to_a_layer_whose_backward_sums_and_none_where_nothing_is_partial(
    by_rank: ByRank, case: LayerCase
) -> None:
    partial = any(states_partial(case.layer, side, 2, case.sequence) for side in ("row", "col") if case.scaled(side))
    for found in by_rank("collectives", case):
        added = Counter(found["multipliers"])
        added.subtract(Counter(found["plain"]))
        assert sum(added.values()) == int(partial), found
        assert min(added.values()) >= 0, "one collective replaced another"


@pytest.mark.parametrize(("tensor", "rank"), [(1, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize("sides", [("row",), ("col",), ("row", "col", "scalar")], ids="-".join)
def test_padding_rows_of_a_linear_layer_are_not_scaled(sides: tuple[str, ...], tensor: int, rank: int) -> None:
    spec = megatron.vocabulary("q", vocab_size=9, padded_vocab_size=16, cols=3)
    scaling = LayerScaling(spec, {"q": frozenset(sides)}, tensor_shard(rank, tensor))  # type: ignore[arg-type]
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 16 // tensor, 3)
    length = specs.row_multiplier(spec, [0], partial=False).local_shape(Grid(tensor=tensor))[0]
    lengths = {"row": length, "col": 3, "scalar": 1}
    made = [torch.randn(n) if side in sides else None for side, n in lengths.items()]
    start = min(len(weight), max(0, 9 - rank * len(weight)))
    assert torch.equal(scaling.scale(weight, *made)[start:], weight[start:])
    grad_weight = scaling.gradients(grad.clone(), weight, *made)[0]
    assert torch.equal(grad_weight[start:], grad[start:])
