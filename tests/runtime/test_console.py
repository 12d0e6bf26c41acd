"""What programs say."""

from __future__ import annotations

import pytest

from megamult.runtime.console import ranges


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([2, 0, 1, 5], "0-2, 5"), ([1, 3, 4, 9, 8], "1, 3-4, 8-9")]
)
def test_consecutive_numbers_are_said_as_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
