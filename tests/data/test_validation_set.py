"""An evaluation reads every sample of a validation set once, and none twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megamult.data.validation_set import ValidationSet, samples_and_shares
from tests.data.conftest import SEQ, distinct_ids, window

Write = Callable[..., str]


def test_a_set_has_each_sample_of_its_corpus_once(write_indexed: Write, make: Callable) -> None:
    documents = distinct_ids(0, 1)
    dataset = make(write_indexed("a", documents))
    (per_epoch,) = dataset.samples_per_epoch
    for limit in (None, per_epoch, 100 * per_epoch):
        found = ValidationSet(dataset, limit)
        found.prepare()
        assert len(found) == per_epoch == (sum(map(len, documents)) - 1) // SEQ
        # Every token id occurs once in the corpus, so samples without a common token are different samples.
        tokens = [token for i in range(per_epoch) for token in window(found[i])[:-1]]
        assert len(set(tokens)) == per_epoch * SEQ
        assert [found.weight(i) for i in range(per_epoch)] == [1 / per_epoch] * per_epoch


def test_what_fills_the_last_micro_batch_can_be_read_and_does_not_count(write_indexed: Write, make: Callable) -> None:
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    found = ValidationSet(dataset, 5)
    found.prepare()
    assert len(found) == 5
    assert window(found[5]) == window(found[4])
    assert [found.weight(i) for i in range(7)] == [0.2] * 5 + [0.0] * 2


def test_a_limited_blend_reads_what_the_blend_begins_with(write_indexed: Write, make: Callable) -> None:
    dataset = make((write_indexed("a", distinct_ids(0, 1)), 3.0), (write_indexed("b", distinct_ids(5000, 2)), 1.0))
    found = ValidationSet(dataset, 12)
    found.prepare()
    dataset_windows = sorted(window(found[i]) for i in range(len(found)))
    dataset.prepare(0, 12)
    assert dataset_windows == sorted(window(dataset[i]) for i in range(12))
    assert [found.weight(i) for i in range(12)] == pytest.approx([1 / 12] * 12, rel=1e-15)


def test_a_source_that_is_used_up_keeps_its_share_of_the_loss() -> None:
    # 12 samples, 9 and 3 by weight, and the second source has only 2.
    assert samples_and_shares([100, 2], [3.0, 1.0], 12) == ([9, 2], [0.75, 0.25])
    assert samples_and_shares([100, 2], [3.0, 1.0], None) == ([100, 2], [0.75, 0.25])
    counts, shares = samples_and_shares([7, 2, 5], [1.0, 5.0, 2.0], 10**6)
    assert counts == [7, 2, 5]
    assert sum(shares) == pytest.approx(1.0, rel=1e-15)
