"""Samples that a run leaves out are those of the ranges, and all others come in their order."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable

import pytest

from megamult.data.dataset import BlendedDataset
from megamult.data.skip import NOTHING, Skip, changes_of_the_past
from tests.data.conftest import distinct_ids, of

Write = Callable[..., str]

RANGES = [
    [],
    [(160, 319)],
    [(0, 0)],
    [(0, 9), (10, 12), (14, 14), (40, 47)],
    [(3, 5), (6, 6), (100, 200)],
]


def kept(skip: Skip, count: int = 400) -> list[int]:
    """Positions that are not left out, by hand."""
    return [p for p in range(count) if not any(first <= p <= last for first, last in skip.ranges)]


@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_positions_are_those_outside_the_ranges_in_order(ranges: list[tuple[int, int]]) -> None:
    skip = Skip.of(ranges)
    expected = kept(skip)
    assert [skip.position(i) for i in range(len(expected))] == expected
    assert [skip.reached(i) for i in range(len(expected))] == [0, *(p + 1 for p in expected)][: len(expected)]
    draw = random.Random(1)
    for _ in range(100):
        first, last = sorted(draw.choices(range(len(expected) + 1), k=2))
        spans = skip.spans(first, last)
        assert [p for start, stop in spans for p in range(start, stop)] == expected[first:last]
        # Intervals are as long as they can be: a range lies between any two.
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))


def test_every_range_is_passed_once_however_the_steps_are_cut() -> None:
    skip = Skip.of([(0, 3), (16, 20), (21, 30), (40, 40)])
    for batch in (1, 3, 16, 100):
        found = [each for first in range(0, 96, batch) for each in skip.passed(first, first + batch)]
        assert found == list(skip.ranges)
    assert skip.passed(0, 12) == [(0, 3)]
    assert skip.passed(12, 13) == [(16, 20), (21, 30)]


@pytest.mark.parametrize(
    ("old", "new", "samples", "expected"),
    [
        ([(160, 319)], [(160, 319)], 200, []),
        ([], [(160, 319)], 160, []),
        ([(160, 319)], [], 160, []),  # reached, and not passed: sample 320 has not been read
        ([(160, 319)], [(160, 250)], 160, []),
        ([(160, 319)], [(160, 319), (500, 510)], 340, []),
        ([(160, 319)], [(160, 319), (500, 510)], 341, ["has the samples 500 to 500, on which"]),
        ([(160, 319)], [], 161, ["lacks the samples 160 to 319, which"]),
        ([(160, 319)], [(170, 319)], 161, ["lacks the samples 160 to 169, which"]),
        ([(5, 9)], [(4, 6), (8, 8)], 100, ["lacks the samples 7 to 7, 9 to 9, which", "has the samples 4 to 4, on"]),
        ([], [(150, 170)], 160, ["has the samples 150 to 159, on which the run has trained already (a range that is"]),
        ([(0, 9), (10, 19)], [(0, 19)], 50, []),  # the same samples
        ([(7, 9)], [], 0, []),
    ],
)
def test_what_has_been_read_and_left_out_stays_and_the_rest_may_change(
    old: list[tuple[int, int]], new: list[tuple[int, int]], samples: int, expected: list[str]
) -> None:
    found = changes_of_the_past(Skip.of(new), Skip.of(old), samples)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_a_dataset_leaves_them_out_over_restarts_and_in_a_new_blend(write_indexed: Write, make: Callable) -> None:
    a, b = (write_indexed(name, distinct_ids(start, start)) for name, start in (("a", 10), ("b", 9000)))
    blend = ((a, 3.0), (b, 1.0))
    whole = make(*blend)
    (epoch, _) = whole.samples_per_epoch
    # Inside a batch, and more than an epoch of both sources.
    skip = Skip.of([(5, 9), (20, 20 + 6 * epoch), (30 + 6 * epoch, 31 + 6 * epoch)])
    expected = [whole[position] for position in kept(skip, 40 + 6 * epoch)]

    def same(dataset: BlendedDataset, first: int, last: int) -> None:
        dataset.prepare(first, last)
        opened = [set(source._epochs) for source in dataset._sources]
        for i in range(first, last):
            assert all((dataset[i][key] == expected[i][key]).all() for key in ("tokens", "labels")), i
        assert [set(source._epochs) for source in dataset._sources] == opened, "all that is read was prepared"
        assert not opened[0] & {1, 2, 3}, "no epoch is opened that is left out"

    one = make(*blend, skip=skip)
    same(one, 0, 12)
    two = make(*blend, skip=skip)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())), 12)
    same(two, 12, len(expected))
    with pytest.raises(ValueError, match=r"data\.skip lacks the samples 5 to 9, .*: set data\.skip back"):
        make(*blend).load_state_dict(two.state_dict(), 12)
    # A new blend begins after what has been read: positions of the old order count, those that were left out too.
    other = make(b, skip=skip)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())), 12)
    alone = make(b)
    read = whole.blend.counts(17)[1]  # positions 0 to 16: twelve samples and five left out
    assert of(other, range(12, 15)) == of(alone, range(read, read + 3))


def test_no_ranges_leave_nothing_out(write_indexed: Write, make: Callable) -> None:
    a = write_indexed("a", distinct_ids(0, 1))
    assert of(make(a), range(20)) == of(make(a, skip=NOTHING), range(20))
    assert make(a).state_dict()["skip"] == []
