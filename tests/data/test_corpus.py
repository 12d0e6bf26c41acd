"""Preparation: what is written, independence of the number of processes, the split, and atomicity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megamult.data import corpus, encoding
from megamult.data.corpus import prepare_corpus
from megamult.data.documents import read_documents
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.split import ValidSplit

SUFFIXES = ["_train.bin", "_train.idx", "_valid.bin", "_valid.idx", ".model"]


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def outputs(prefix: Path) -> dict[str, bytes]:
    return {s: Path(f"{prefix}{s}").read_bytes() for s in SUFFIXES if Path(f"{prefix}{s}").exists()}


def test_text_blocks_and_json_lines_are_the_same_documents(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"\xef\xbb\xbf one\n  two \n \t\n\n\nthree\r\n\r\n\xc3\xa9\x0cend\n\n")
    expected = [" one\n  two ", "three", "é\x0cend"]
    lines.write_text("".join(json.dumps({"id": 1, "body": t}) + "\n" for t in expected))
    blocks = list(read_documents([text]))
    assert [d.text for d in blocks] == expected
    assert [d.line for d in blocks] == [1, 6, 8]
    assert [d.text for d in read_documents([lines], "body")] == expected


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5, 0.999])
def test_the_split_has_its_size_and_spreads(fraction: float) -> None:
    for n in [*range(2, 60), 1000]:
        split = ValidSplit.of(n, fraction)
        valid = [d for d in range(n) if split.is_valid(d)]
        assert len(valid) == split.valid == min(max(1, round(n * fraction)), n - 1)
        # One in each of `valid` equal ranges.
        for stratum, d in enumerate(valid):
            assert stratum * n // len(valid) <= d < (stratum + 1) * n // len(valid)
    assert not any(ValidSplit.of(5, 0).is_valid(d) for d in range(5))


def test_train_and_valid_hold_each_document_once_with_its_end(
    tmp_path: Path, documents: list[str], model: Path
) -> None:
    source = write_text(tmp_path / "c.txt", documents)
    summary = prepare_corpus([source], tmp_path / "out", tokenizer=model, valid_fraction=0.1)
    tokenizer = SentencePieceTokenizer(tmp_path / "out.model")
    texts = {}
    for part in ("train", "valid"):
        data = IndexedDataset(str(tmp_path / f"out_{part}"))
        assert data.index.dtype == np.uint16
        assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in data)
        texts[part] = [tokenizer.decode(ids) for ids in data]
    split = ValidSplit.of(len(documents), 0.1)
    assert texts["train"] == [d for i, d in enumerate(documents) if not split.is_valid(i)]
    assert texts["valid"] == [d for i, d in enumerate(documents) if split.is_valid(i)]
    assert (summary.train_documents, summary.valid_documents) == (55, 6)
    assert summary.text_bytes == sum(len(d.encode()) for d in documents)
    tokens = sum(len(tokenizer.encode(d)) + 1 for d in documents)
    assert summary.bytes_per_token == summary.text_bytes / tokens


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARS", 200)  # many batches, more than are in flight at once
    source = write_text(tmp_path / "c.txt", documents)
    for workers in (1, 3):
        prepare_corpus([source], tmp_path / f"w{workers}", vocab_size=350, valid_fraction=0.1, workers=workers)
    assert outputs(tmp_path / "w1") == outputs(tmp_path / "w3")
    assert len(outputs(tmp_path / "w1")) == len(SUFFIXES)


def test_a_failure_leaves_earlier_outputs_and_nothing_else(
    tmp_path: Path, documents: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_text(tmp_path / "c.txt", documents)
    prepare_corpus([source], tmp_path / "out", tokenizer=model)
    before, names = outputs(tmp_path / "out"), sorted(tmp_path.iterdir())

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    for step in ("validate_indexed", "unigram_entropy", "encode_in_order"):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, step, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare_corpus([source], tmp_path / "out", vocab_size=300)
        assert outputs(tmp_path / "out") == before
        assert sorted(tmp_path.iterdir()) == names


def test_without_validation_no_earlier_valid_set_stays(tmp_path: Path, documents: list[str], model: Path) -> None:
    source = write_text(tmp_path / "c.txt", documents)
    prepare_corpus([source], tmp_path / "out", tokenizer=model)
    assert prepare_corpus([source], tmp_path / "out", tokenizer=model, valid_fraction=0).valid_documents == 0
    assert sorted(outputs(tmp_path / "out")) == [".model", "_train.bin", "_train.idx"]
