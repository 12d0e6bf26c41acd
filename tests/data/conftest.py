"""A small corpus, a tokenizer trained on it, indexed files written without Megatron or megamult, samples of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from megamult.data.dataset import BlendedDataset
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer


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
def tokenizer(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


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


SEQ = 8


@dataclass
class StubTokenizer:
    """What the dataset reads of a tokenizer, for ids that no trained one is needed for."""

    vocab_size: int = 60_000
    eod: int = 2
    sha256: str = "stub"
    unique_identifiers: dict[str, str] = field(default_factory=lambda: {"class": "stub"})


def distinct_ids(start: int, seed: int) -> list[list[int]]:
    """Documents in which every token id occurs once in all, so that a sample tells where it was cut."""
    draw, documents = random.Random(seed), []
    for _ in range(30):
        length = draw.choice([1, 2, 5, 9, 40])
        documents.append(list(range(start, start + length)))
        start += length
    return documents


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., BlendedDataset]:
    def make(*sources: str | tuple[str, float], seed: int = 7, **changes: object) -> BlendedDataset:
        weighted = [s if isinstance(s, tuple) else (s, 1.0) for s in sources]
        options = {
            "tokenizer": StubTokenizer(),
            "seq_length": SEQ,
            "cache_dir": tmp_path / "cache",
            **changes,
        }
        return BlendedDataset(weighted, seed=seed, **options)

    return make


def window(item: dict[str, torch.Tensor]) -> list[int]:
    assert set(item) == {"tokens", "labels"}
    assert item["tokens"].dtype == item["labels"].dtype == torch.int64
    assert item["tokens"].shape == item["labels"].shape == (SEQ,)
    assert item["tokens"][1:].tolist() == item["labels"][:-1].tolist()
    return [*item["tokens"].tolist(), int(item["labels"][-1])]


def of(dataset: BlendedDataset, samples: range) -> list[list[int]]:
    return [window(dataset[i]) for i in samples]


def same_lengths(start: int) -> list[list[int]]:
    """Documents whose lengths are always the same: only their tokens tell corpora apart."""
    return [list(range(start + 10 * n, start + 10 * n + 10)) for n in range(40)]
