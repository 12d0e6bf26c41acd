"""Sums of losses over data-parallel ranks and, in the same collective, the sums of all ranks' votes on stopping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh


def mean_and_votes(mesh: Mesh, value: Tensor, votes: Sequence[float] = ()) -> tuple[float, list[float]]:
    """Return an fp32 scalar's mean over data-parallel ranks and the sums of `votes` over all ranks, in one collective.

    The votes of all ranks are summed, because a signal may reach only one rank. The scalar is the same on all ranks of
    a tensor-parallel group, so only the first rank of each group contributes it. The others contribute zeros, which
    change no bit of an fp32 sum.
    """
    (total,), sums = sums_and_votes(mesh, value.view(1), votes)
    return total / mesh.size_of("data"), sums


def sums_and_votes(mesh: Mesh, values: Tensor, votes: Sequence[float] = ()) -> tuple[list[float], list[float]]:
    """Return the sum of each of `values` over data-parallel ranks and the sums of `votes` over all ranks, in one
    collective and in the dtype of `values`. See :func:`mean_and_votes`."""
    packed = device.upload(torch.tensor([0.0] * len(values) + list(votes), dtype=values.dtype))
    if mesh.rank_on("tensor") == 0:
        packed[: len(values)] = values
    mesh.sum_over(packed)
    sums = packed.tolist()
    return sums[: len(values)], sums[len(values) :]
