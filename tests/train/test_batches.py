"""Micro-batches are read ahead, by one rank of each tensor-parallel group, and are what they would be without that."""

from __future__ import annotations

import pytest

from megamult.train import batches
from tests.processes import run_distributed
from tests.train.batch_workers import SIZE, ahead, taken


@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_each_rank_takes_its_groups_samples_and_one_rank_reads_them(world: int, tensor: int) -> None:
    data = world // tensor
    for rank, (found, read, threads) in enumerate(run_distributed(world, taken, tensor)):
        place = rank // tensor
        first = [(micro * data + place) * SIZE for micro in range(6)]
        assert found == [[start, start + 1, -start, -start - 1] for start in first]
        # Each sample once, in order, and none beyond the last that was allowed.
        assert read == ([] if rank % tensor else [i for start in first for i in (start, start + 1)])
        assert threads == (set() if rank % tensor else {"samples"})


def test_so_much_is_read_ahead_and_an_error_waits_for_its_micro_batch() -> None:
    ((before, after, raised),) = run_distributed(1, ahead)
    depth = batches._AHEAD * SIZE
    assert before == list(range(depth))  # sample 5, which is bad, among them
    assert raised == ["0", "2", "sample 5 is bad", "6"]
    assert after == list(range(depth + 4 * SIZE))
