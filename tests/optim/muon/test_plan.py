"""Who owns which matrix: balance, determinism, traffic; every element travels to its owner once."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from examples.benchmarks.muon_plan import LLAMA, zero_cuts
from megamult.optim.muon.newton_schulz import flops, workspace
from megamult.optim.muon.plan import Matrix, Plan, assign, lower_bound, make_plan
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from megamult.parameters.rectangles import rectangles
from megamult.zero.partition import Cut, even_intervals, flat_intervals

LAYOUTS = [
    megatron.fused_qkv(12, 2, 8, 96),  # 128 rows: TP 4 cuts through a query group
    megatron.single_matrix("attention_out", 96, 96, 1),
    megatron.fused_gate_up(132, 96),
    megatron.single_matrix("down", 96, 132, 1),
]

COST = partial(flops, steps=5)
"""Cost of a matrix by its shape."""


def small(stage: int, data: int, tensor: int, bucket_elements: int = 2**25) -> Plan:
    """Two layers of the layouts above."""
    return make_plan(zero_cuts(LAYOUTS * 2, tensor, data, stage), Grid(tensor=tensor, data=data), COST, bucket_elements)


def test_flat_intervals_tile_a_parameter_that_straddles_partitions() -> None:
    assert flat_intervals(offset=5, numel=12, partition_size=8, ranks=3) == ((0, 3), (3, 8), (11, 1))
    assert [n for _, n in flat_intervals(offset=8, numel=4, partition_size=8, ranks=3)] == [0, 4, 0]
    assert even_intervals(10, 4) == ((0, 3), (3, 3), (6, 3), (9, 1))
    assert [n for _, n in even_intervals(2, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(("stage", "data", "tensor"), list(itertools.product((1, 3), (1, 2, 3), (1, 2, 4))))
def test_every_element_of_every_matrix_is_held_once_and_reaches_its_owner(stage: int, data: int, tensor: int) -> None:
    plan = small(stage, data, tensor)
    assert sorted(i for bucket in plan.buckets for i in bucket) == list(range(len(plan.matrices))) == list(range(14))
    for i, matrix in enumerate(plan.matrices):
        seen = np.zeros((matrix.rows, matrix.cols), dtype=int)
        for rank in range(plan.ranks):
            held = 0
            for cut, r in plan.fragments(i, rank):
                assert (cut, r.part) == (matrix.cut, matrix.part)
                seen[r.row : r.row + r.height, r.col : r.col + r.width] += 1
                held += r.numel
            assert held == plan.held[i, rank]
        assert (seen == 1).all()


@pytest.mark.parametrize(("stage", "data", "tensor"), [(1, 2, 2), (3, 3, 1), (1, 1, 4)])
def test_traffic_is_what_the_fragments_say(stage: int, data: int, tensor: int) -> None:
    plan = small(stage, data, tensor, bucket_elements=10_000)
    assert len(plan.buckets) > 1
    sent = np.zeros(plan.ranks, dtype=int)
    for i, owner in enumerate(plan.owners):
        for rank in range(plan.ranks):
            numel = sum(r.numel for _, r in plan.fragments(i, rank))
            if rank != owner:
                sent[rank] += numel  # momentum, to the owner
                sent[owner] += numel  # the update, back
    assert (plan.sent == sent).all()


@pytest.mark.parametrize(("stage", "data", "tensor"), [(1, 2, 2), (3, 3, 4), (1, 2, 1)])
def test_of_replicas_the_first_travel_to_the_owner_and_all_take_its_results(stage: int, data: int, tensor: int) -> None:
    stated = megatron.single_matrix("gate", 8, 96, None)
    limit = 20_000
    plan = make_plan(zero_cuts([*LAYOUTS, stated], tensor, data, stage), Grid(tensor=tensor, data=data), COST, limit)
    i = next(i for i, matrix in enumerate(plan.matrices) if plan.cuts[matrix.cut].spec is stated)
    given, taken = np.zeros((2, *plan.held.shape), dtype=int)
    for k, rank in itertools.product(range(len(plan.matrices)), range(plan.ranks)):
        taken[k, rank] = sum(r.numel for _, r in plan.fragments(k, rank))
        given[k, rank] = taken[k, rank] if k != i or rank % tensor == 0 else 0
    assert (plan.held == taken).all() and (plan.given == given).all()
    assert given[i].sum() == 8 * 96 and taken[i].sum() == tensor * 8 * 96
    sent = np.zeros(plan.ranks, dtype=int)
    for bucket in plan.buckets:
        for k, rank in itertools.product(bucket, range(plan.ranks)):
            if rank != (owner := plan.owners[k]):
                sent[rank] += given[k, rank]
                sent[owner] += taken[k, rank]
    assert (plan.sent == sent).all()
    for bucket, rank in itertools.product(plan.buckets, range(plan.ranks)):
        others = [k for k in bucket if plan.owners[k] != rank]
        mine = [k for k in bucket if plan.owners[k] == rank]
        assert sum(taken[k, rank] for k in others) <= limit or len([k for k in others if taken[k, rank]]) == 1
        assert sum(taken[k].sum() for k in mine) <= limit or len(mine) == 1


def test_results_for_replicas_are_temporary_memory_of_all_that_take_them() -> None:
    stated = megatron.single_matrix("gate", 8, 96, None)
    plan = make_plan(zero_cuts([stated], 4, 2, 1), Grid(tensor=4, data=2), COST)
    (owner,) = plan.owners
    for rank in range(plan.ranks):
        if rank != owner:
            assert plan.temporary[rank] == plan.held[0, rank] == 8 * 96 / 2
    # The matrix, what Newton-Schulz needs, and the results for the seven others.
    assert plan.temporary[owner] == 8 * 96 + workspace(8, 96) + 7 * 8 * 96 / 2


@pytest.mark.parametrize(("stage", "data", "tensor"), [(1, 2, 1), (1, 4, 2), (3, 2, 2)])
def test_a_bucket_bounds_what_a_rank_takes_and_what_it_sends(stage: int, data: int, tensor: int) -> None:
    limit = 14_000
    plan = small(stage, data, tensor, bucket_elements=limit)
    assert max(m.numel for m in plan.matrices) < limit and len(plan.buckets) > 1
    for bucket, rank in itertools.product(plan.buckets, range(plan.ranks)):
        assert sum(plan.matrices[i].numel for i in bucket if plan.owners[i] == rank) <= limit
        assert sum(plan.held[i, rank] for i in bucket if plan.owners[i] != rank) <= limit


def test_of_equally_loaded_ranks_the_one_that_holds_most_becomes_the_owner() -> None:
    held = np.array([[0, 1, 9], [5, 4, 1], [0, 9, 1], [3, 3, 4]])
    # Largest first: 2 goes where 9 of it are; 0 then finds ranks 0 and 2 idle; then 1; the last to the least loaded.
    assert assign([50, 40, 60, 10], held) == [2, 0, 1, 0]


@pytest.mark.parametrize("model", LLAMA)
@pytest.mark.parametrize("data", [1, 8, 32, 128])
def test_busiest_rank_is_near_the_mean_wherever_the_mean_is_four_matrices(model: str, data: int) -> None:
    plan = make_plan(zero_cuts(LLAMA[model].specs(), 8, data, 1), Grid(tensor=8, data=data), COST)
    costs = [flops(m.rows, m.cols, 5) for m in plan.matrices]
    mean = sum(costs) / plan.ranks
    assert plan.loads.sum() == sum(costs)
    if mean >= 4 * max(costs):
        assert plan.loads.max() <= 1.05 * mean
    # Where it is not, whole matrices cannot do much better; Graham's bound for largest-first is 4/3.
    assert plan.loads.max() <= 4 / 3 * lower_bound(costs, plan.ranks)


def test_some_llama_layouts_have_a_mean_of_four_matrices() -> None:
    """Else the test above would show nothing."""
    for model, data in (("8B", 1), ("70B", 1), ("70B", 8)):
        matrices = [Matrix(0, 0, *p.shape) for stated in LLAMA[model].specs() for p in stated.parts]
        costs = [flops(m.rows, m.cols, 5) for m in matrices]
        assert sum(costs) / (8 * data) >= 4 * max(costs)


def test_lower_bound_knows_that_matrices_are_not_split() -> None:
    assert lower_bound([6, 6, 6], 2) == 12  # the mean is 9
    assert lower_bound([10, 1], 4) == 10
    assert lower_bound([3, 3, 3, 3], 2) == 6


def test_matrices_of_one_cost_are_dealt_to_the_ranks_that_hold_them_at_the_same_loads() -> None:
    """Balance by itself, in turn from the largest, would give the first two to the ranks 0 and 1."""
    held = np.array([[8, 0], [8, 0], [0, 8], [3, 5], [8, 0]])
    assert assign([5, 5, 5, 5, 7], held) == [0, 1, 1, 1, 0]  # 17 of cost 5: rank 0 has the 7, and one place of the four
    assert assign([5, 5, 5, 5], held[:4]) == [0, 0, 1, 1]


def test_no_matrix_travels_where_every_rank_holds_an_equal_share_of_each_shape() -> None:
    """Two ranks with two layers each. By balance only, neighbours in the buffer go to different ranks."""
    plan = small(1, 2, 1)
    assert plan.sent.tolist() == [0, 0] and plan.loads[0] == plan.loads[1]


@pytest.mark.parametrize("data", [3, 8])
def test_owners_that_hold_much_save_most_of_the_traffic_of_contiguous_partitions(data: int) -> None:
    """Strangers as owners would send every element to the owner and back; owners by balance only, 0.65 and 0.86."""
    plan = make_plan(zero_cuts(LLAMA["8B"].specs(), 1, data, 1), Grid(data=data), COST)
    assert plan.sent.sum() <= 0.5 * 2 * sum(m.numel for m in plan.matrices)


def test_a_cut_that_nobody_shares_sends_nothing() -> None:
    stated = LAYOUTS[1]
    plan = make_plan([Cut("w", stated, even_intervals(96 * 96, 1), torch.float32)], Grid(), COST)
    assert plan.sent.tolist() == [0]
    assert sum(r.numel for r in rectangles(stated, tensor_shard(0, 1), 0, 96 * 96)) == plan.held.sum()


def test_no_matrix_at_all_is_an_empty_plan() -> None:
    plan = make_plan([], Grid(tensor=2), COST)
    assert plan.buckets == () and plan.sent.tolist() == [0, 0] and plan.temporary.tolist() == [0, 0]


def test_a_plan_for_1024_ranks_holds_every_element_once() -> None:
    plan = make_plan(zero_cuts(LLAMA["70B"].specs(), 8, 128, 3), Grid(tensor=8, data=128), COST)
    assert plan.ranks == 1024
    assert (plan.held.sum(axis=1) == [m.numel for m in plan.matrices]).all()
