"""The vote on stopping travels beside the loss: one collective per step, and no bit of the loss changes."""

from __future__ import annotations

import math
import signal
from unittest import mock

import pytest
import torch

from megamult.runtime.signals import StopRequests
from tests.processes import run_distributed

TENSOR, REPEATS = 2, 40


def means() -> list[tuple[float, float, list[float], int]]:
    """Means of values with and without votes beside them, what was voted, and the collectives that a mean took."""
    from megamult.distributed import start
    from megamult.distributed.mesh import current_mesh
    from megamult.train.votes import mean_and_votes

    mesh, found = start.initialize(TENSOR), []
    for repeat in range(REPEATS):
        # The same on the ranks of a tensor-parallel group, as a loss is.
        generator = torch.Generator().manual_seed(1000 * repeat + mesh.rank_on("data"))
        value = 3 + torch.rand((), generator=generator)
        if repeat == REPEATS - 1 and mesh.rank_on("data") == 1:
            value.fill_(math.nan)
        plain = value.clone()
        torch.distributed.all_reduce(plain, group=current_mesh().groups["data"])
        votes = [float(mesh.rank == repeat % mesh.size), 0.0, 1.0]
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as collective:
            mean, sums = mean_and_votes(mesh, value, votes)
        found.append((plain.item() / mesh.size_of("data"), mean, sums, collective.call_count))
    return found


def test_the_mean_over_data_parallel_ranks_has_the_bits_that_it_has_without_votes() -> None:
    """Three data-parallel ranks: the order in which fp32 numbers are added shows."""
    ranks = run_distributed(6, means)
    for found in ranks:
        for plain, mean, sums, collectives in found[:-1]:
            assert mean == plain
            assert sums == [1.0, 0.0, 6.0], "every rank's vote counts, those of tensor-parallel replicas too"
            assert collectives == 1
        plain, mean, sums, _ = found[-1]
        assert math.isnan(plain) and math.isnan(mean)
        assert sums == [1.0, 0.0, 6.0], "a loss that is not finite must not silence a vote"
    assert len({found[0][1] for found in ranks}) == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ([], None),
        (["SIGINT"], "SIGINT"),
        (["SIGINT", "SIGUSR1", "SIGUSR1"], "SIGUSR1"),
        (["SIGUSR1", "SIGTERM"], "SIGTERM"),
        (["SIGTERM", "late"], "SIGTERM"),
        (["late"], "train.max_minutes"),
    ],
)
def test_ranks_that_were_asked_differently_stop_for_one_reason(asked: list[str], reason: str | None) -> None:
    sums = torch.tensor(StopRequests().ballot())
    for what in asked:
        voter = StopRequests(deadline=0.0 if what == "late" else None)
        if what != "late":
            voter._asked = signal.Signals[what]
        sums += torch.tensor(voter.ballot())
    assert StopRequests.decided(sums.tolist()) == reason
