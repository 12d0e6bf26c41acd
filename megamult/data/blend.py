"""Weighted blend of sources: exact, stateless arithmetic maps each sample of the blend to a sample of a source.

The sources are the leaves of a binary tree, in which each node halves its list of sources. At a node whose left half
has the share p of the node's weight, ceil(i p) of the node's first i samples go to the left half, and the others go to
the right half. So sample i is found in O(log sources) steps, without going through the samples before it. The result
never depends on how many samples a run asks for. Among the first i samples each source has its share of i to within
1 + log2(sources) samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Blend:
    """The blend of sources with positive `weights`, which need not sum to 1.

    Raises:
        ValueError: `weights` is empty, or a weight is not a positive finite number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights:
            raise ValueError("the blend has no sources (0 given): give at least one data prefix")
        for position, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"the weight of data source {position} is {weight}: give a positive number, or leave the source out"
                )
        # Integers in the exact ratio of the weights: floating-point shares would drift at large i.
        shares = [Fraction(weight) for weight in weights]
        denominator = math.lcm(*(share.denominator for share in shares))
        self._bounds = [0]
        for share in shares:
            self._bounds.append(self._bounds[-1] + int(share * denominator))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _left(self, first: int, last: int, i: int) -> int:
        """Return how many of the first `i` samples of the node of sources [first, last) go to its left half."""
        middle = (first + last) // 2
        left, both = self._bounds[middle] - self._bounds[first], self._bounds[last] - self._bounds[first]
        return -(-i * left // both)

    def locate(self, i: int) -> tuple[int, int]:
        """Return (source, k): sample `i` >= 0 of the blend is sample k of that source."""
        first, last = 0, len(self)
        while last - first > 1:
            middle, left = (first + last) // 2, self._left(first, last, i)
            if self._left(first, last, i + 1) > left:
                last, i = middle, left
            else:
                first, i = middle, i - left
        return first, i

    def counts(self, i: int) -> list[int]:
        """Return the number of samples of each source among the first `i` samples of the blend."""

        def divide(first: int, last: int, n: int) -> list[int]:
            if last - first == 1:
                return [n]
            middle, left = (first + last) // 2, self._left(first, last, n)
            return divide(first, middle, left) + divide(middle, last, n - left)

        return divide(0, len(self), i)
