"""Preparation: what is written, independence of the number of processes, the split, and atomicity."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megamult.data import corpus, encoding
from megamult.data.corpus import prepare_corpus
from megamult.data.defects import Report
from megamult.data.documents import read_documents
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.split import ValidSplit
from tests.data.conftest import make_documents

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
    report = Report()
    blocks = list(read_documents([str(text)], "text", report))
    assert [d.text for d in blocks] == expected
    assert [d.place for d in blocks] == [f"{text}, line {number}" for number in (1, 6, 8)]
    assert [d.text for d in read_documents([str(lines)], "body", report)] == expected
    assert [d.size for d in blocks] == [len(t.encode()) for t in expected]
    assert report.lines() == [f"files of different formats: 1 of plain text ({text}), 1 of JSON lines ({lines})"]


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


def test_the_same_documents_in_every_format_give_the_same_files(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra corpora")
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra corpora")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra corpora")
    texts = make_documents(500)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    parquet.write_table(pyarrow.table({"text": texts, "id": range(500)}), tmp_path / "a.parquet", row_group_size=77)
    write_text(tmp_path / "a.txt", texts)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, start in enumerate(range(0, 500, 100)):
        part = b"".join(lines.splitlines(keepends=True)[start : start + 100])
        (folder / f"{number}.json").write_bytes(gzip.compress(part) if number % 2 else part)
    found = []
    for source in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "folder", "folder/*.json"):
        summary = prepare_corpus([tmp_path / source], tmp_path / "out", vocab_size=400, valid_fraction=0.1)
        found.append(outputs(tmp_path / "out"))
        assert summary.report.lines() == []
        assert (summary.train_documents, summary.valid_documents) == (450, 50)
    assert all(each == found[0] for each in found) and len(found[0]) == len(SUFFIXES)


def test_a_corpus_that_is_written_into_its_inputs_folder_can_be_written_again(
    tmp_path: Path, documents: list[str], model: Path
) -> None:
    write_text(tmp_path / "c.txt", documents)
    for _ in range(2):
        summary = prepare_corpus([tmp_path], tmp_path / "out", tokenizer=model)
        assert summary.train_documents + summary.valid_documents == len(documents)
    with pytest.raises(ValueError, match=r"formats that are not read \(.*out_train\.idx: it is a Megatron"):
        prepare_corpus([tmp_path], tmp_path / "other", tokenizer=model)


def test_a_signal_comes_too_late_once_files_get_their_names(
    tmp_path: Path, documents: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, handler = os.replace, signal.getsignal(signal.SIGTERM)

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    prepare_corpus([write_text(tmp_path / "c.txt", documents)], tmp_path / "out", tokenizer=model)
    assert len(outputs(tmp_path / "out")) == len(SUFFIXES)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_full_disk_names_the_output(
    tmp_path: Path, documents: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus.IndexedWriter, "add", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'out'}'")):
        prepare_corpus([write_text(tmp_path / "c.txt", documents)], tmp_path / "out", tokenizer=model)
    assert [p.name for p in tmp_path.iterdir()] == ["c.txt"]


def test_on_error_is_checked(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore': give 'fail' or 'skip'"):
        prepare_corpus([tmp_path], tmp_path / "out", tokenizer=model, on_error="ignore")
