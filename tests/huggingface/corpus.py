"""A small tokenizer whose corpus is hard on merges: repeated characters, spaces in a row, more than one script."""

from __future__ import annotations

import random
from pathlib import Path

from megamult.data.sentencepiece_tokenizer import train_tokenizer

VOCAB = 400


def texts() -> list[str]:
    """Documents of words over few letters (so that merges overlap), runs of one character, indented lines."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aabbcdeé中", k=draw.randint(1, 9))) for _ in range(150)]
    runs = ["=" * n for n in range(1, 20)] + ["aaaa" * n for n in range(1, 8)] + ["abab" * n for n in range(1, 5)]
    lines = [" " * draw.randint(0, 9) + " ".join(draw.choices(words + runs, k=8)) for _ in range(300)]
    return ["\n".join(lines[i : i + 10]) + "\n\n\tend" for i in range(0, len(lines), 10)]


def make_tokenizer(path: Path) -> Path:
    """Train one of :data:`VOCAB` tokens."""
    train_tokenizer(texts(), VOCAB, path)
    return path
