"""A weighted blend of sources: which sample of which source each of its samples is, by exact, stateless arithmetic.

The weights are halved again and again, as in a binary tree over the sources. At a node whose left part has the share p,
ceil(i p) of the first i samples go left and the others right. So any i is found in O(log sources) steps without what
came before, the answer never depends on how many samples a run asks for, and after every i each source has had its
share of i to within 1 + log2(sources) samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Blend:
    """The blend of sources with positive `weights`, which need not sum to 1.

    Raises:
        ValueError: there is no weight, or one is not a positive finite number.
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
        """Count the samples, of the first `i` of the sources [first, last), that go to the left half of them."""
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
        """Samples of each source among the first `i` of the blend."""

        def divide(first: int, last: int, n: int) -> list[int]:
            if last - first == 1:
                return [n]
            middle, left = (first + last) // 2, self._left(first, last, n)
            return divide(first, middle, left) + divide(middle, last, n - left)

        return divide(0, len(self), i)
