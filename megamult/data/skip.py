"""Ranges of samples that a run leaves out: which sample is the run's i-th, and what a resumed run may change.

A *position* is the number of a sample in the data's order, counted from 0, whether or not it is left out. Ranges are of
positions, so they mean the same samples whatever was left out before, and in whatever sharding the run goes on.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Range = tuple[int, int]
"""(first, last) positions, both included."""


@dataclass(frozen=True)
class Skip:
    """Sorted, disjoint ranges of positions that a run leaves out."""

    ranges: tuple[Range, ...] = ()
    _left_out: list[int] = field(init=False, repr=False, compare=False)  # number of positions in the ranges before each
    _before: list[int] = field(init=False, repr=False, compare=False)  # samples that are read before each range

    def __post_init__(self) -> None:
        assert all(0 <= first <= last for first, last in self.ranges)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(self.ranges))
        lengths = (last - first + 1 for first, last in self.ranges)
        object.__setattr__(self, "_left_out", [0, *itertools.accumulate(lengths)])
        before = [first - gone for (first, _), gone in zip(self.ranges, self._left_out, strict=False)]
        object.__setattr__(self, "_before", before)

    @staticmethod
    def of(ranges: Iterable[Sequence[int]]) -> Skip:
        """Return the object for ranges as a configuration or a checkpoint has them."""
        return Skip(tuple((first, last) for first, last in ranges))

    def position(self, i: int) -> int:
        """Return the position of the run's sample `i`, counted from 0 among the samples that are not left out."""
        return i + self._left_out[bisect.bisect_right(self._before, i)]

    def reached(self, samples: int) -> int:
        """Return the first position after the run's first `samples` samples. A range that begins there may still be
        changed."""
        return self.position(samples - 1) + 1 if samples else 0

    def spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the positions of the run's samples [first, last) as intervals [start, stop) between ranges."""
        if last <= first:
            return []
        inside = [i for i in self._before if first < i < last]
        bounds = [first, *dict.fromkeys(inside), last]
        return [(self.position(start), self.position(stop - 1) + 1) for start, stop in itertools.pairwise(bounds)]

    def passed(self, first: int, last: int) -> list[Range]:
        """Return the ranges that the run passes when it reads its samples [first, last): those that end before one of
        these samples and begin after the samples before them."""
        return [each for each, i in zip(self.ranges, self._before, strict=True) if first <= i < last]


NOTHING = Skip()
"""No range: every sample is read."""


def changes_of_the_past(new: Skip, old: Skip, samples: int) -> list[str]:
    """Return what a run that resumes must not change: texts, or an empty list if it changes nothing of that.

    Args:
        new: ranges of the run.
        old: ranges of the run that saved the checkpoint.
        samples: number of samples that run had trained on.
    """
    reached = old.reached(samples)
    was, now = (_below(each.ranges, reached) for each in (old, new))
    found = []
    if lost := _without(was, now):
        found.append(f"data.skip lacks the samples {_text(lost)}, which the run has left out")
    if trained := _without(now, was):
        found.append(
            f"data.skip has the samples {_text(trained)}, on which the run has trained already (a range that is new "
            f"may begin with sample {reached})"
        )
    return found


def _below(ranges: Iterable[Range], stop: int) -> list[Range]:
    """Return the part of the ranges below position `stop`."""
    return [(first, min(last, stop - 1)) for first, last in ranges if first < stop]


def _without(ranges: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    """Return the positions that are in `ranges` and not in `others`, which are sorted, as ranges."""
    found = []
    for first, last in ranges:
        for start, stop in others:
            if stop < first or start > last:
                continue
            if start > first:
                found.append((first, start - 1))
            first = stop + 1
        if first <= last:
            found.append((first, last))
    return found


def _text(ranges: Sequence[Range]) -> str:
    return ", ".join(f"{first} to {last}" for first, last in ranges)
