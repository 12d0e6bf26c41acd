"""A small corpus, a tokenizer trained on it, and indexed files written without Megatron or megamult."""

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megamult.data.tokenizer import Tokenizer, train_tokenizer


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few lines without a blank one, with double spaces and a letter beyond ASCII."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randint(2, 7))) for _ in range(120)]
    documents = []
    for number in range(count):
        lines = ["  ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(draw.randint(1, 5))]
        documents.append(f"document {number}\n" + "\n".join(lines))
    return documents


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(61)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_tokenizer(documents, 400, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture
def write_indexed(tmp_path: Path) -> Callable[..., str]:
    """write(name, documents of token ids, dtype) -> prefix, by the published layout of the format."""

    def write(name: str, sequences: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
        prefix = tmp_path / name
        code = {np.uint16: 8, np.int32: 4}[dtype]
        lengths = np.array([len(s) for s in sequences], "<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
        prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        prefix.with_suffix(".idx").write_bytes(
            header + lengths.tobytes() + pointers.astype("<i8").tobytes() + bounds.tobytes()
        )
        return str(prefix)

    return write
