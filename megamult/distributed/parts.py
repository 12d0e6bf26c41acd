"""Collectives on a flat buffer that is cut into equal parts, one for each process of a group.

Over NCCL these are its reduce-scatter and its all-gather. Over gloo, those two take several times as long as sending
the parts themselves from process to process, because gloo sums and gathers whole buffers by way of copies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

_PIECE = 2**20
"""Elements that are received at once before they are added to the others. Larger temporary tensors would cost more than
their sum, because a CPU's allocator gives large memory back, and the system clears it anew."""


def average_own_part(flat: Tensor, group: ProcessGroup) -> None:
    """Average this process's part of a buffer over the processes of a group, in place. Collective over the group.

    The other parts of the buffer are undefined afterwards.

    Args:
        flat: [ranks x length] the buffer, contiguous.
        group: the group. Its process of rank i gets the mean of the i-th part.
    """
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return
    parts = flat.chunk(ranks)
    if flat.device.type != "cpu":
        torch.distributed.reduce_scatter_tensor(parts[rank], flat, group=group)
        parts[rank].mul_(1 / ranks)
        return
    pieces = [part.split(_PIECE) for part in parts]
    others = _others(group)
    # Two sets of buffers: one receives while the other is added.
    room = [[torch.empty_like(pieces[rank][0]) for _ in others] for _ in range(2)]

    def swap(k: int) -> tuple[list[Tensor], list[Work]]:
        received = [each[: pieces[rank][k].numel()] for each in room[k % 2]]
        return received, _swap([pieces[other][k] for other in others], received, group)

    arriving = swap(0)
    for k, own in enumerate(pieces[rank]):
        received, works = arriving
        _wait(works)
        if k + 1 < len(pieces[rank]):
            arriving = swap(k + 1)
        for each in received:
            own.add_(each)
        own.mul_(1 / ranks)


def spread_own_part(flat: Tensor, group: ProcessGroup) -> None:
    """Send this process's part of a buffer to all processes of a group. Collective over the group.

    Args:
        flat: [ranks x length] the buffer, contiguous. Its i-th part becomes that of the process of rank i.
        group: the group.
    """
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return
    parts = flat.chunk(ranks)
    if flat.device.type != "cpu":
        torch.distributed.all_gather_into_tensor(flat, parts[rank], group=group)
        return
    others = _others(group)
    _wait(_swap([parts[rank] for _ in others], [parts[other] for other in others], group))


def _others(group: ProcessGroup) -> list[int]:
    """Return the ranks of the other processes of a group."""
    return [rank for rank in range(group.size()) if rank != group.rank()]


def _swap(sent: list[Tensor], received: list[Tensor], group: ProcessGroup) -> list[Work]:
    """Begin to send a tensor to each other process of the group, and to receive one from each, in order of ranks."""
    works = []
    for other, source, target in zip(_others(group), sent, received, strict=True):
        works.append(torch.distributed.irecv(target, group=group, group_src=other))
        works.append(torch.distributed.isend(source, group=group, group_dst=other))
    return [work for work in works if work is not None]


def _wait(works: list[Work]) -> None:
    for work in works:
        work.wait()
