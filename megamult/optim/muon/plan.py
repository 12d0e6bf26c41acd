"""Which rank orthogonalizes which logical matrix, and in which order they travel. Pure, the same on every rank.

Each logical matrix has one owner in the data-parallel x tensor-parallel grid. Ranks are numbered as in
:class:`megamult.distributed.mesh.Grid`: data-parallel rank x TP size + tensor-parallel rank.

Of a matrix that TP replicates, the copies that count elsewhere (:meth:`Layout.counted_on`) travel to the owner, and all
ranks take results: replicas stay alike, whatever became of their gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megamult.optim.muon.newton_schulz import flops, workspace
from megamult.parameters.rectangles import Rectangle, rectangles
from megamult.zero.partition import Cut

BUCKET_ELEMENTS = 2**25
"""Elements that one rank takes as an owner, or sends to owners, in one exchange (64 MiB in bf16)."""


@dataclass(frozen=True)
class Matrix:
    """One logical matrix W[rows, cols]: a part of the parameter `cuts[cut]`."""

    cut: int
    part: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Plan:
    """Owners and buckets of all logical matrices."""

    cuts: tuple[Cut, ...]
    tp_size: int
    steps: int
    """Of Newton-Schulz."""
    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    """Rank of each matrix."""
    buckets: tuple[tuple[int, ...], ...]
    """Matrices by exchange: what any rank takes as an owner and what it sends to owners is bounded in each."""
    held: NDArray[np.int64] = field(compare=False)
    """[matrices, ranks]: how many elements of each matrix each rank holds, and takes from the owner."""
    given: NDArray[np.int64] = field(compare=False)
    """[matrices, ranks]: how many of them it gives to the owner."""

    @property
    def ranks(self) -> int:
        """Data-parallel x tensor-parallel size."""
        return len(self.cuts[0].intervals) * self.tp_size if self.cuts else self.tp_size

    def fragments(self, matrix: int, rank: int) -> Iterator[tuple[int, Rectangle]]:
        """(index of the cut, rectangle) of all that `rank` holds of a matrix, in the order in which it travels.

        A rectangle's offset counts from the beginning of the rank's interval of the parameter.
        """
        where = self.matrices[matrix]
        cut = self.cuts[where.cut]
        data_rank, tp_rank = divmod(rank, self.tp_size)
        start, length = cut.intervals[data_rank]
        for rectangle in rectangles(cut.spec, tp_rank, self.tp_size, start, length) if length else ():
            if rectangle.part == where.part:
                yield where.cut, rectangle

    @cached_property
    def loads(self) -> NDArray[np.int64]:
        """[ranks]: Newton-Schulz FLOPs per optimizer step."""
        loads = np.zeros(self.ranks, dtype=np.int64)
        np.add.at(loads, list(self.owners), [flops(m.rows, m.cols, self.steps) for m in self.matrices])
        return loads

    @cached_property
    def sent(self) -> NDArray[np.int64]:
        """[ranks]: elements that each rank sends to others in both exchanges of an optimizer step."""
        sent = np.zeros(self.ranks, dtype=np.int64)
        for bucket in self.buckets:
            sent += self._travels(bucket, self.given)[0] + self._travels(bucket, self.held)[1]
        return sent

    @cached_property
    def temporary(self) -> NDArray[np.int64]:
        """[ranks]: most elements that are there at once beside momentum and gradients.

        While bucket k is computed there are its matrices or their results, what Newton-Schulz needs for the largest
        batch, and the buffers that it came in or goes back in; k + 1 is arriving and k - 1 is going back.
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
                work[k, owner] = max(work[k, owner], size * workspace(rows, cols))
            there[k + 1] = sum(self._travels(bucket, self.given))
            back[k + 1] = sum(self._travels(bucket, self.held))
        now = np.maximum(there, back)
        return (owned + work + back[:-2] + now[1:-1] + there[2:]).max(axis=0)

    def _travels(
        self, bucket: Sequence[int], elements: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[ranks] each: of `elements` [matrices, ranks], those of others' matrices that a rank holds, and those of its
        own matrices that others hold."""
        index, owners = list(bucket), [self.owners[i] for i in bucket]
        own = elements[index, owners]
        by_holder = elements[index].sum(axis=0)
        np.subtract.at(by_holder, owners, own)
        by_owner = np.zeros(self.ranks, dtype=np.int64)
        np.add.at(by_owner, owners, elements[index].sum(axis=1) - own)
        return by_holder, by_owner


def make_plan(cuts: Sequence[Cut], tp_size: int, steps: int, bucket_elements: int = BUCKET_ELEMENTS) -> Plan:
    """Owners and buckets of all logical matrices of the parameters `cuts`.

    Args:
        cuts: the matrix parameters, with what every data-parallel rank holds of them.
        tp_size: tensor-parallel size.
        steps: of Newton-Schulz, for its FLOPs.
        bucket_elements: see :data:`BUCKET_ELEMENTS`.
    """
    matrices = tuple(Matrix(i, p, *part.shape) for i, cut in enumerate(cuts) for p, part in enumerate(cut.spec.parts))
    if not matrices:
        nothing = np.zeros((0, tp_size), dtype=np.int64)
        return Plan((), tp_size, steps, (), (), (), nothing, nothing)
    held = held_elements(cuts, matrices, tp_size)
    counted = np.array([[cuts[m.cut].spec.counted_on(tp_rank) for tp_rank in range(tp_size)] for m in matrices])
    given = held * np.tile(counted, held.shape[1] // tp_size)
    owners = assign([flops(m.rows, m.cols, steps) for m in matrices], given)
    buckets = _buckets(matrices, owners, held, bucket_elements)
    return Plan(tuple(cuts), tp_size, steps, matrices, tuple(owners), tuple(buckets), held, given)


def assign(costs: Sequence[int], held: NDArray[np.int64]) -> list[int]:
    """An owner for each matrix: largest first, to the rank with the least to do; of those, to the largest holder.

    Largest first exceeds the best possible makespan by a third at most (R. L. Graham, "Bounds on multiprocessing
    timing anomalies", SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: of each matrix.
        held: [matrices, ranks], elements held.

    Returns:
        The rank of each matrix.
    """
    loads = np.zeros(held.shape[1], dtype=np.int64)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        idle = np.flatnonzero(loads == loads.min())
        owners[i] = int(idle[held[i, idle].argmax()])
        loads[owners[i]] += costs[i]
    return owners


def held_elements(cuts: Sequence[Cut], matrices: Sequence[Matrix], tp_size: int) -> NDArray[np.int64]:
    """[matrices, ranks]: how many elements of each logical matrix each rank holds."""
    data_size = len(cuts[0].intervals) if cuts else 1
    first: dict[int, int] = {}
    for i, matrix in enumerate(matrices):
        first.setdefault(matrix.cut, i)
    held = np.zeros((len(matrices), data_size, tp_size), dtype=np.int64)
    for index, cut in enumerate(cuts):
        spec = cut.spec
        starts = np.array([start for start, _ in cut.intervals])
        stops = starts + np.array([length for _, length in cut.intervals])
        for tp_rank in range(tp_size):
            cols = spec.local_columns(tp_rank, tp_size)[1]
            for run in spec.local_segments(tp_rank, tp_size):
                begin, end = run.start * cols, (run.start + run.length) * cols
                inside = np.minimum(stops, end) - np.maximum(starts, begin)
                held[first[index] + run.part, :, tp_rank] += np.maximum(inside, 0)
    return held.reshape(len(matrices), data_size * tp_size)


def lower_bound(costs: Sequence[int], ranks: int) -> int:
    """What no assignment of whole matrices can make the busiest rank's cost smaller than."""
    ordered = sorted(costs, reverse=True)
    best = max(-(-sum(ordered) // ranks), ordered[0])
    # Among the k * ranks + 1 largest, some rank has k + 1, each at least as large as the smallest of them.
    for k in range(1, (len(ordered) - 1) // ranks + 1):
        best = max(best, (k + 1) * ordered[k * ranks])
    return best


def _buckets(
    matrices: Sequence[Matrix], owners: Sequence[int], held: NDArray[np.int64], bucket_elements: int
) -> list[tuple[int, ...]]:
    """Matrices in exchanges. No rank owns (replicas counted each: it sends results to all), and none holds of others',
    more than `bucket_elements` in one, unless a single matrix is larger than that."""
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
