"""Indexed files as Megatron's own builder writes them, byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megamult.data import writing
from megamult.data.writing import IndexedWriter


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500])
def test_the_files_are_those_of_megatrons_builder(
    tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_CHUNK", 3)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, vocab_size, length, dtype=np.int32) for length in (4, 1, 9, 2, 0, 7, 30)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    with IndexedWriter(tmp_path / "ours", vocab_size) as writer:
        for ids in documents:
            builder.add_document(ids, [len(ids)])
            writer.add(ids[:3], last=False)
            writer.add(ids[3:], last=True)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert writer.documents == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_a_document_longer_than_an_index_can_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document number 0 .* has 2147483648 tokens"):  # noqa: SIM117
        with IndexedWriter(tmp_path / "ours", 300) as writer:
            writer._length = 2**31 - 1
            writer.add(np.ones(1, np.int32), last=True)
