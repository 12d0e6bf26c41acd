"""Plan of Muon's exchange: the owner of each logical matrix, and the buckets in which matrices are exchanged.

Pure functions compute the plan, so it is the same on every rank. Each logical matrix has one owner, the process of the
grid (:class:`megamult.parameters.axes.Grid`) that orthogonalizes it.

If several processes hold copies of a piece, only the copy that counts in sums (:attr:`Rectangle.counted`) is sent to
the owner. All processes that hold a copy receive the result. The copies therefore stay equal, even if their gradients
differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megamult.optim.muon.newton_schulz import workspace
from megamult.parameters.axes import Grid
from megamult.parameters.rectangles import Rectangle, rectangles
from megamult.zero.partition import Cut

BUCKET_ELEMENTS = 2**25
"""Largest number of elements that one rank receives as an owner, or sends to owners, in one bucket (64 MiB in bf16),
unless a single matrix has more."""


@dataclass(frozen=True)
class Matrix:
    """A logical matrix W[rows, cols]: one part of one parameter."""

    cut: int
    """Index of the parameter in `Plan.cuts`."""
    part: int
    """Index of the part in the parameter's spec."""
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Plan:
    """Owners and buckets of all logical matrices."""

    cuts: tuple[Cut, ...]
    grid: Grid
    matrices: tuple[Matrix, ...]
    costs: tuple[int, ...]
    """Cost of orthogonalizing each matrix, by which owners are chosen: FLOPs, or a measured time."""
    owners: tuple[int, ...]
    """Rank that owns each matrix."""
    buckets: tuple[tuple[int, ...], ...]
    """Indices of the matrices in each bucket. Matrices of one bucket are exchanged together."""
    held: NDArray[np.int64] = field(compare=False)
    """[matrices, ranks] number of elements of each matrix that each rank holds. The owner sends results for all of
    these elements to the rank."""
    given: NDArray[np.int64] = field(compare=False)
    """[matrices, ranks] number of elements of each matrix that each rank sends to the owner: those that count in
    sums."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.grid.size

    def fragments(self, matrix: int, rank: int, counted: bool = False) -> Iterator[tuple[int, Rectangle]]:
        """Yield (index in `cuts`, rectangle) of each piece of a matrix that `rank` holds, in the order of the buffers.

        The offset of a rectangle counts from the beginning of the rank's interval of the parameter.

        Args:
            matrix: index of the matrix.
            rank: the rank that holds the pieces.
            counted: if True, yield only the copies that count, which are sent to the owner. If False, yield all copies,
                which receive results from the owner.
        """
        where, coordinates = self.matrices[matrix], self.grid.coordinates(rank)
        cut = self.cuts[where.cut]
        start, length = cut.held_by(coordinates)
        for rectangle in rectangles(cut.spec, coordinates, start, length) if length else ():
            if rectangle.part == where.part and (rectangle.counted or not counted):
                yield where.cut, rectangle

    @cached_property
    def loads(self) -> NDArray[np.int64]:
        """Sum of the costs of the matrices that each rank owns: [ranks]."""
        loads = np.zeros(self.ranks, dtype=np.int64)
        np.add.at(loads, list(self.owners), list(self.costs))
        return loads

    @cached_property
    def sent(self) -> NDArray[np.int64]:
        """Number of elements that each rank sends to other ranks in one optimizer step, [ranks].

        A rank sends its pieces to the owners and, as an owner, results to the ranks that hold the pieces.
        """
        sent = np.zeros(self.ranks, dtype=np.int64)
        for bucket in self.buckets:
            sent += self._travels(bucket, self.given)[0] + self._travels(bucket, self.held)[1]
        return sent

    @cached_property
    def temporary(self) -> NDArray[np.int64]:
        """Largest number of temporary elements that each rank holds at once: [ranks].

        While a rank computes bucket k, it holds the matrices of this bucket or their results, the workspace of
        Newton-Schulz for the largest batch, and the buffers in which the bucket has arrived or will return. It also
        holds the buffers of bucket k + 1, which arrives, and of bucket k - 1, which returns. Momentum and gradients are
        not counted.
        """
        count = len(self.buckets)
        if not count:
            return np.zeros(self.ranks, dtype=np.int64)
        owned = np.zeros((count, self.ranks), dtype=np.int64)
        work = np.zeros((count, self.ranks), dtype=np.int64)
        there, back = np.zeros((2, count + 2, self.ranks), dtype=np.int64)
        for k, bucket in enumerate(self.buckets):
            batches = Counter((self.owners[i], self.matrices[i].rows, self.matrices[i].cols) for i in bucket)
            for (owner, rows, cols), size in batches.items():
                owned[k, owner] += size * rows * cols
                work[k, owner] = max(work[k, owner], workspace(rows, cols, size))
            there[k + 1] = sum(self._travels(bucket, self.given))
            back[k + 1] = sum(self._travels(bucket, self.held))
        now = np.maximum(there, back)
        return (owned + work + back[:-2] + now[1:-1] + there[2:]).max(axis=0)

    def _travels(
        self, bucket: Sequence[int], elements: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the elements of a bucket that are sent between holders and owners, by holder and by owner.

        Args:
            bucket: indices of the matrices in the bucket.
            elements: [matrices, ranks] number of elements of each rank. Those of a matrix's owner do not travel.

        Returns:
            Two arrays [ranks]. The first counts elements that the rank holds and other ranks own. The second counts
            elements that the rank owns and other ranks hold. An element is owned by the owner of its matrix.
        """
        index, owners = list(bucket), [self.owners[i] for i in bucket]
        own = elements[index, owners]
        by_holder = elements[index].sum(axis=0)
        np.subtract.at(by_holder, owners, own)
        by_owner = np.zeros(self.ranks, dtype=np.int64)
        np.add.at(by_owner, owners, elements[index].sum(axis=1) - own)
        return by_holder, by_owner


def make_plan(
    cuts: Sequence[Cut], grid: Grid, cost: Callable[[int, int], int], bucket_elements: int = BUCKET_ELEMENTS
) -> Plan:
    """Choose owners and buckets of all logical matrices in the given parameters.

    Args:
        cuts: cuts of the parameters, which say what each data-parallel rank holds.
        grid: the grid of the processes.
        cost: function from the shape (rows, cols) of a matrix to the cost of orthogonalizing it, in any unit. It must
            give the same on every rank.
        bucket_elements: limit for one rank in one bucket, see :data:`BUCKET_ELEMENTS`.
    """
    matrices = tuple(Matrix(i, p, *part.shape) for i, cut in enumerate(cuts) for p, part in enumerate(cut.spec.parts))
    if not matrices:
        nothing = np.zeros((0, grid.size), dtype=np.int64)
        return Plan((), grid, (), (), (), (), nothing, nothing)
    held, given = held_elements(cuts, matrices, grid)
    costs = tuple(cost(m.rows, m.cols) for m in matrices)
    owners = assign(costs, given)
    buckets = _buckets(matrices, owners, held, bucket_elements)
    return Plan(tuple(cuts), grid, matrices, costs, tuple(owners), tuple(buckets), held, given)


def assign(costs: Sequence[int], held: NDArray[np.int64]) -> list[int]:
    """Choose the owner of each matrix so that the total costs of the ranks are nearly equal and little is sent.

    Matrices are assigned from the most to the least costly. The owner is the rank with the least total cost so far; if
    several ranks have the least, it is the one of them that holds most elements of the matrix. Then the matrices of
    each cost are dealt out anew to the ranks that own some of them, as many to each as before: a matrix goes to a rank
    that holds much of it, and the total costs stay as they are.

    The largest total cost is at most 4/3 of that of an optimal assignment (R. L. Graham, "Bounds on multiprocessing
    timing anomalies", SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: cost of each matrix.
        held: [matrices, ranks] number of elements of each matrix that each rank holds.

    Returns:
        The rank that owns each matrix.
    """
    loads = np.zeros(held.shape[1], dtype=np.int64)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        idle = np.flatnonzero(loads == loads.min())
        owners[i] = int(idle[held[i, idle].argmax()])
        loads[owners[i]] += costs[i]
    by_cost: dict[int, list[int]] = {}
    for i, cost in enumerate(costs):
        by_cost.setdefault(cost, []).append(i)
    for members in by_cost.values():
        places = Counter(owners[i] for i in members)
        ranks, left = sorted(places), set(members)
        # Pairs of a matrix and a rank, the one with the largest piece first.
        for pair in np.argsort(-held[np.ix_(members, ranks)], axis=None, kind="stable"):
            i, rank = members[pair // len(ranks)], ranks[pair % len(ranks)]
            if i in left and places[rank]:
                owners[i] = rank
                left.remove(i)
                places[rank] -= 1
    return owners


def held_elements(
    cuts: Sequence[Cut], matrices: Sequence[Matrix], grid: Grid
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many elements of each matrix each rank holds, and how many of these it sends to the owner.

    Where several ranks hold copies of an element, only one of them sends it. Both results are [matrices, ranks].
    """
    first: dict[int, int] = {}
    for i, matrix in enumerate(matrices):
        first.setdefault(matrix.cut, i)
    held, given = np.zeros((2, len(matrices), grid.size), dtype=np.int64)
    for shard in grid.shards():
        # Ranks of the processes that have this shard of the model, in the order of data-parallel ranks.
        ranks = np.array([replace(shard, data=data).rank for data in range(grid.data)])
        for index, cut in enumerate(cuts):
            starts = np.array([start for start, _ in cut.intervals])
            stops = starts + np.array([length for _, length in cut.intervals])
            cols = cut.spec.local_cols(shard)[1]
            segments, counted = cut.spec.local_segments(shard), cut.spec.counted_segments(shard)
            for segment, counts in zip(segments, counted, strict=True):
                begin, end = segment.start * cols, (segment.start + segment.length) * cols
                inside = np.maximum(np.minimum(stops, end) - np.maximum(starts, begin), 0)
                held[first[index] + segment.part, ranks] += inside
                given[first[index] + segment.part, ranks] += inside * counts
    return held, given


def lower_bound(costs: Sequence[int], ranks: int) -> int:
    """Return a lower bound on the total cost of the costliest rank. It holds for all assignments of whole matrices."""
    ordered = sorted(costs, reverse=True)
    best = max(-(-sum(ordered) // ranks), ordered[0])
    # Some rank has k + 1 of the k * ranks + 1 largest costs, and each of these is at least `ordered[k * ranks]`.
    for k in range(1, (len(ordered) - 1) // ranks + 1):
        best = max(best, (k + 1) * ordered[k * ranks])
    return best


def _buckets(
    matrices: Sequence[Matrix], owners: Sequence[int], held: NDArray[np.int64], bucket_elements: int
) -> list[tuple[int, ...]]:
    """Divide the matrices into buckets, and return the indices of the matrices in each.

    In each bucket, each rank sends at most `bucket_elements` elements of results as an owner, where an element counts
    once for each rank that holds a copy of it, and it holds at most `bucket_elements` elements of matrices that other
    ranks own. A single matrix may exceed both limits.
    """
    queues: dict[int, list[int]] = {}
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].numel, matrices[i].rows, i)):
        queues.setdefault(owners[i], []).append(i)
    buckets: list[tuple[int, ...]] = []
    while any(queues.values()):
        bucket: list[int] = []
        away = np.zeros(held.shape[1], dtype=np.int64)
        for owner, queue in sorted(queues.items()):
            taken, left = 0, []
            for i in queue:
                others = held[i].copy()
                others[owner] = 0
                fits = taken == 0 or taken + held[i].sum() <= bucket_elements
                if fits and bool(((away + others <= bucket_elements) | (away == 0) | (others == 0)).all()):
                    bucket.append(i)
                    taken += held[i].sum()
                    away += others
                else:
                    left.append(i)
            queues[owner] = left
        buckets.append(tuple(bucket))
    return buckets
