"""Compressed files under any name: their content, parts in a row, and damage."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from megamult.data.compression import DamagedFile, open_decompressed
from megamult.data.corpus import prepare_corpus
from megamult.data.defects import Report
from megamult.data.documents import read_documents
from tests.data.conftest import make_documents

# Distinct texts, so that the compressed file is larger than what is read at once.
TEXTS = [f"{number} {text}" for number, text in enumerate(make_documents(1000))]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard", reason="needs the extra corpora").ZstdCompressor().compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstd,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
EACH = pytest.mark.parametrize("name", COMPRESS)


@EACH
def test_the_content_is_read_whatever_the_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.txt"
    half = len(LINES) // 2
    empty = b"\x53\x2a\x4d\x18\x02\0\0\0ab" if name == "zstd" else b""  # a frame without content
    for content in (
        empty + COMPRESS[name](LINES),
        COMPRESS[name](LINES[:half]) + COMPRESS[name](b"") + COMPRESS[name](LINES[half:]),
    ):
        path.write_bytes(content)
        stream, compression = open_decompressed(str(path))
        with stream:
            assert (stream.read(), compression) == (LINES, name)
        report = Report()
        assert [d.text for d in read_documents([str(path)], "text", report)] == TEXTS
        assert report.lines() == []
    path.write_bytes(COMPRESS[name](b""))
    assert list(read_documents([str(path)], "text", report)) == []
    assert report.lines() == [f"1 file without text was skipped ({path})"]


@EACH
def test_a_file_that_is_cut_off_or_damaged_is_dropped_whole(tmp_path: Path, name: str, model: Path) -> None:
    path, content = tmp_path / "a.jsonl", COMPRESS[name](LINES)
    (tmp_path / "good.txt").write_text("one\n\ntwo")
    middle = len(content) * 2 // 3
    damaged = content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 99]) + content[middle + 99 :]
    for bad in (content[:-1], content[:middle], damaged, content + b"more"):
        path.write_bytes(bad)
        inputs, output = [path, tmp_path / "good.txt"], tmp_path / "out"
        with pytest.raises(ValueError, match=r"1 file is damaged \(.*a\.jsonl: the compressed content is .*: copy it"):
            prepare_corpus(inputs, output, tokenizer=model)
        # What comes before the damage may be wrong too: gzip has its checksum at the end.
        summary = prepare_corpus(inputs, output, tokenizer=model, on_error="skip")
        assert summary.train_documents + summary.valid_documents == 2
        assert any(line.startswith("dropped: 1 file is damaged") for line in summary.report.lines())


def test_compressed_files_in_compressed_files_are_refused(tmp_path: Path) -> None:
    path, report = tmp_path / "a.jsonl.gz", Report()
    path.write_bytes(gzip.compress(bz2.compress(LINES)))
    assert list(read_documents([str(path)], "text", report)) == []
    with pytest.raises(ValueError, match="it is bzip2 within gzip, by its first bytes: decompress it once"):
        report.refuse()


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", fail)
    path, parquet, report = tmp_path / "a.txt", tmp_path / "b", Report()
    path.write_bytes(b"\x28\xb5\x2f\xfd more")
    parquet.write_bytes(b"PAR1\x15 more")
    assert list(read_documents([str(path), str(parquet)], "text", report)) == []
    with pytest.raises(
        ValueError, match=r"2 inputs cannot be opened \(.*a\.txt: needs the library zstandard"
    ) as caught:
        report.refuse(skip_defects=True)
    assert "b: needs the library pyarrow, which is not installed: install the extra `corpora`" in str(caught.value)


def test_reading_a_little_at_once_keeps_memory_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(bytes(20_000_000)))  # 19 kB
    stream, _ = open_decompressed(str(path))
    with stream:
        first = stream.read1(1 << 30)
        assert 0 < len(first) <= (1 << 14) * 1032 and len(first) + len(stream.read()) == 20_000_000


def test_the_end_of_a_damaged_file_is_an_exception_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(LINES)[:-5])
    stream, _ = open_decompressed(str(path))
    with stream, pytest.raises(DamagedFile, match="is cut off"):
        stream.read()
