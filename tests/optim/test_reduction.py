"""Partial gradients of copied blocks are summed over the processes that hold copies, and over no others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.multipliers.specs import row_multiplier
from megamult.optim.reduction import PartialGradients
from megamult.parameters.axes import Axis, tensor_shard
from megamult.parameters.rectangles import boxes, rectangles
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Segment

NAMES, SIZES, COLS = ("z", "b", "c", "dt"), (16, 8, 8, 8), 3


def projection(groups: int, tail: tuple[int, ...] = (COLS,)) -> ParameterSpec:
    """[z, B, C, dt], of which B and C are cut once for each group, and copies get partial gradients."""
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    blocks = [Block(size, groups if name in ("b", "c") else None) for name, size in zip(NAMES, SIZES, strict=True)]
    return ParameterSpec(
        tuple(Part(name, "up", (size, *tail)) for name, size in zip(NAMES, SIZES, strict=True)),
        (sum(SIZES), *tail),
        tuple(Segment(start, i, 0, size) for i, (start, size) in enumerate(zip(starts, SIZES, strict=True))),
        (Sharding("tensor", 0, tuple(blocks)),),
        reduce_over=("tensor",),
    )


@dataclass
class _Peers:
    """Mesh of one process, whose sums are those of all processes that have called it in the first of two rounds."""

    coordinates: Any
    total: list[Tensor]
    round: int

    def size_of(self, axis: Axis) -> int:
        return self.coordinates.grid.size_of(axis)

    def sum_over(self, tensor: Tensor, axis: Axis) -> Tensor:
        if self.round == 1:
            return tensor.copy_(self.total[0])
        self.total[:] = [tensor.clone() if not self.total else self.total[0] + tensor]
        return tensor


def specs() -> dict[str, ParameterSpec]:
    """Weights, a convolution, and row multipliers of all parts and of some."""
    matrix = projection(2)
    return {
        "one group": projection(1),
        "two groups": matrix,
        "three dimensions": projection(2, (1, 4)),
        "row multipliers": row_multiplier(matrix, [0, 1, 2, 3], partial=True),
        "row multipliers of some": row_multiplier(matrix, [0, 2], partial=True),
    }


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("cuts", [1, 3], ids=["whole", "in three slices"])
@pytest.mark.parametrize("name", specs())
def test_copies_get_the_sum_of_their_partial_gradients_and_shards_keep_theirs(
    name: str, cuts: int, tensor: int
) -> None:
    spec = specs()[name]
    ranks = [tensor_shard(rank, tensor) for rank in range(tensor)]
    numel = spec.local_shape(ranks[0].grid)
    flat = int(torch.Size(numel).numel())
    bounds = [flat * k // cuts for k in range(cuts + 1)]
    slices = [
        SimpleNamespace(spec=spec, name="w", start=start, length=stop - start)
        for start, stop in itertools.pairwise(bounds)
    ]
    torch.manual_seed(0)
    # Integers, so that sums are exact.
    own = [torch.randint(-9, 10, (flat,)).double() for _ in ranks]
    expected: dict[tuple[int, ...], float] = {}

    def elements(rank: int) -> list[tuple[int, tuple[int, ...]]]:
        """(position in the shard, part and index within it) of each element that a rank holds."""
        found = []
        for r in rectangles(spec, ranks[rank], 0, flat):
            for box in boxes(spec.parts[r.part].shape, r):
                index = torch.cartesian_prod(
                    *(torch.arange(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                ).view(-1, len(box.sizes))
                found += [(r.offset + box.start + k, (r.part, *each)) for k, each in enumerate(index.tolist())]
        return found

    for rank in range(tensor):
        for position, index in elements(rank):
            expected[index] = expected.get(index, 0.0) + float(own[rank][position])
    total: list[Tensor] = []
    for turn in range(2):
        for rank in range(tensor):
            mesh = _Peers(ranks[rank], total, turn)
            partition: Any = SimpleNamespace(slices=slices, mesh=mesh)
            gradients = [own[rank][a:b].clone() for a, b in itertools.pairwise(bounds)]
            PartialGradients(partition)(gradients)
            if turn == 1:
                whole = torch.cat(gradients)
                for position, index in elements(rank):
                    assert float(whole[position]) == expected[index], (rank, index)


def test_copies_at_different_places_of_the_shards_are_refused() -> None:
    spec = ParameterSpec(
        (Part("a", "up", (4, COLS)), Part("b", "up", (4, COLS))),
        (8, COLS),
        (Segment(0, 0, 0, 4), Segment(4, 1, 0, 4)),
        (Sharding("tensor", 0, (Block(8, 2),)),),
        reduce_over=("tensor",),
    )
    rows = row_multiplier(spec, [0], partial=True)
    mesh = _Peers(tensor_shard(0, 4), [], 0)
    piece = SimpleNamespace(spec=rows, name="proj.row_multiplier", start=0, length=4)
    with pytest.raises(ValueError, match=r"copies of a block of proj\.row_multiplier at different elements"):
        PartialGradients(SimpleNamespace(slices=[piece], mesh=mesh))  # type: ignore[arg-type]
