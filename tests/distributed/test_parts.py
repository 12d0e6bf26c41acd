"""The collectives on parts of a buffer against those of torch on the whole buffer."""

from __future__ import annotations

import torch

from tests.processes import run_distributed


def differences(length: int) -> tuple[float, bool]:
    """The largest error of this process's mean, and whether all parts arrived, on buffers of `length` per process."""
    from megamult.distributed.mesh import current_mesh
    from megamult.distributed.parts import average_own_part, spread_own_part

    torch.distributed.init_process_group("gloo")
    group = current_mesh().world
    assert group is not None
    ranks, rank = group.size(), group.rank()
    flat = torch.randn(ranks * length, generator=torch.Generator().manual_seed(rank))
    mean = flat.double()
    torch.distributed.all_reduce(mean)
    mean /= ranks
    average_own_part(flat, group)
    error = (flat.chunk(ranks)[rank] - mean.chunk(ranks)[rank]).abs().max()
    narrow = torch.full((ranks * length,), float(rank), dtype=torch.bfloat16)
    spread_own_part(narrow, group)
    there = torch.equal(narrow, torch.arange(ranks).repeat_interleave(length).bfloat16())
    torch.distributed.destroy_process_group()
    return float(error), there


def test_each_process_gets_the_mean_of_its_part_and_the_parts_of_all() -> None:
    """More elements than a piece has, and no multiple of it."""
    for error, there in run_distributed(3, differences, 2**20 + 5):
        # Two sums and a product of numbers of size 1 to 5 in fp32.
        assert error < 3 * 5 * 2**-24 and there
