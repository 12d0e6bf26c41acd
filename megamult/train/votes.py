"""The mean of a loss and the ranks' votes on stopping, in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh


def mean_and_votes(mesh: Mesh, value: Tensor, votes: Sequence[float] = ()) -> tuple[float, list[float]]:
    """Return an fp32 scalar's mean over data-parallel ranks and the sums of `votes` over all ranks, in one collective.

    All ranks take part, because a signal may reach only one rank, so that each has different votes. Tensor-parallel
    ranks hold the same value. Only the first rank of each tensor-parallel group adds its value to the sum. The others
    add zeros, which change no bit of an fp32 sum.
    """
    packed = device.upload(torch.tensor([0.0, *votes], dtype=torch.float32))
    if mesh.rank_on("tensor") == 0:
        packed[0] = value
    mesh.sum_over(packed)
    total, *sums = packed.tolist()
    return total / mesh.size_of("data"), sums
