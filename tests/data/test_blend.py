"""The blend follows its weights at every prefix, gives each source's samples in order, needs no history."""

from __future__ import annotations

import math

import pytest

from megamult.data.blend import Blend

WEIGHTS = [[1.0], [0.5, 0.5], [0.7, 0.3], [3, 1, 1e-3], [0.1] * 7, [8, 4, 2, 1, 1], [1e-6, 1e6, 2.5]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_the_weights_proportions(weights: list[float]) -> None:
    blend = Blend(weights)
    seen = [0] * len(weights)
    bound = 1 + math.log2(len(weights))
    for i in range(3000):
        assert blend.counts(i) == seen
        source, k = blend.locate(i)
        assert k == seen[source]
        seen[source] += 1
        for share, count in zip(weights, seen, strict=True):
            assert abs(share / sum(weights) * (i + 1) - count) <= bound


def test_a_late_position_is_consistent_and_in_proportion() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    first = 10**8
    seen = blend.counts(first)
    assert sum(seen) == first
    assert all(abs(n - w * first) < 4 for n, w in zip(seen, (0.7, 0.2, 0.1), strict=True))
    for i in range(first, first + 100):
        source, k = blend.locate(i)
        assert k == seen[source]
        seen[source] += 1


def test_weights_are_relative() -> None:
    assert [Blend([3, 1]).locate(i) for i in range(50)] == [Blend([0.75, 0.25]).locate(i) for i in range(50)]


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=f"source 1 is {weight}: give a positive"):
        Blend([1.0, weight])
    with pytest.raises(ValueError, match="no sources"):
        Blend([])
