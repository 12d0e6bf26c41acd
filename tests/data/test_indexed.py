"""Damaged pairs of .bin and .idx, ids outside the vocabulary, and the unigram entropy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamult.data import indexed
from megamult.data.indexed import read_index, unigram_entropy, validate_indexed

Write = Callable[..., str]
DEEP = r"good\.idx is damaged: sequence 1 has length 1 at byte 6, which is not where sequence 0 ends"
NEGATIVE = r"good\.idx is damaged: sequence 0 has the negative length -1"
LATE = r"good\.idx is damaged: sequence 0 has length 3 at byte 2, and the first sequence must begin at byte 0"
"""What only a check of every sequence finds."""


def test_a_good_pair_is_described(write_indexed: Write) -> None:
    for dtype in (np.uint16, np.int32):
        files = validate_indexed(write_indexed("good", [[5, 6, 7], [], [8]], dtype), 9)
        assert (files.tokens, files.sequences, files.documents, files.dtype) == (4, 3, 3, dtype)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (
            ".bin",
            lambda b: b[:-1],
            r"good\.bin has 7 bytes, but .*good\.idx describes 8: the file is cut off",
        ),
        (".bin", lambda b: b"", r"good\.bin has 0 bytes, but"),
        (".bin", lambda b: b + b"\0\0", r"good\.bin has 10 bytes, but .* longer than its index"),
        (".bin", lambda b: None, r"good\.bin does not exist"),
        (".idx", lambda b: None, r"good\.idx does not exist"),
        (".idx", lambda b: b"MMIDIDY" + b[7:], r"good\.idx is not a Megatron index"),
        (".idx", lambda b: b"", r"good\.idx is not a Megatron index"),
        (".idx", lambda b: b[:20], r"good\.idx is cut off: 20 bytes"),
        (".idx", lambda b: b[:-1], r"good\.idx is cut off"),
        (".idx", lambda b: b[:9] + b"\2" + b[10:], r"good\.idx has version 2"),
        (".idx", lambda b: b[:17] + b"\6" + b[18:], r"token type code 6"),
        (".idx", lambda b: b[:34] + b"\4" + b[35:], DEEP),
        (".idx", lambda b: b[:34] + b"\xff" * 4 + b[38:], NEGATIVE),
        (".idx", lambda b: b[:42] + b"\2" + b[43:], LATE),
        (".idx", lambda b: b[:38] + b"\xff" * 4 + b[42:], r"good\.idx is damaged: its last sequence \(number 1\) has"),
        (".idx", lambda b: b[:-8] + b"\1" + b[-7:], r"good\.idx is damaged: the last of its 3 document bounds"),
    ],
)
def test_damage_is_named(
    write_indexed: Write, suffix: str, damage: Callable[[bytes], bytes | None], message: str
) -> None:
    prefix = write_indexed("good", [[5, 6, 7], [8]])
    file = Path(prefix + suffix)
    content = damage(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        validate_indexed(prefix, 100)
    if message not in (DEEP, NEGATIVE, LATE):
        with pytest.raises(ValueError, match=message):
            read_index(prefix)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_token_outside_the_vocabulary_is_located(
    write_indexed: Write, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK_TOKENS", chunk)
    prefix = write_indexed("c", [[0, 1], [], [2, 3, 9, 1], [9]], np.int32)
    assert validate_indexed(prefix, 10).tokens == 7
    with pytest.raises(ValueError, match=re.escape("c.bin: token id 9 at token 4 (sequence 2)")):
        validate_indexed(prefix, 9)
    prefix = write_indexed("c", [[0, 1], [-1, 3]], np.int32)
    with pytest.raises(ValueError, match=re.escape("c.bin: token id -1 at token 2 (sequence 1)")):
        validate_indexed(prefix, 9)


def test_unigram_entropy_in_nats(write_indexed: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    # Frequencies 1/2, 1/4, 1/4: (1/2) ln 2 + (1/2) ln 4.
    prefix = write_indexed("c", [[3, 3, 0], [1]])
    for chunk in (1, 100):
        monkeypatch.setattr(indexed, "_CHUNK_TOKENS", chunk)
        assert unigram_entropy(prefix, 10) == pytest.approx(1.5 * math.log(2), rel=1e-15)
    assert unigram_entropy(write_indexed("one", [[4, 4]]), 10) == 0.0
