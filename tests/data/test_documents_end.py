"""data.document_mask needs corpora whose documents end with the end-of-document token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megamult.data.described import check_ends, describe
from tests.data.conftest import StubTokenizer

Write = Callable[..., str]


def test_corpora_that_end_with_another_token_are_named_all_at_once(write_indexed: Write) -> None:
    with_it = describe(write_indexed("a", [[5, 6, 2], [7, 2]]), StubTokenizer())
    without = describe(write_indexed("b", [[5, 6, 2], [7, 8]]), StubTokenizer())
    neither = describe(write_indexed("c", [[9]]), StubTokenizer())
    check_ends([with_it], 2)
    with pytest.raises(ValueError, match=r"token 2 in \S*b \(with 8\), \S*c \(with 9\): set data\.eod to the token"):
        check_ends([with_it, without, neither], 2)
