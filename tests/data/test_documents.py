"""Documents as the world writes them: surrogates, marks and line endings in JSON lines, and columns of Parquet."""

from __future__ import annotations

import codecs
import random
from pathlib import Path
from typing import Any

import pytest

from megamult.data.defects import Kind, Report
from megamult.data.documents import read_documents
from megamult.data.parquet import column_values


def read(path: Path, content: bytes, report: Report) -> list[str]:
    path.write_bytes(content)
    return [document.text for document in read_documents([str(path)], "text", report)]


def test_lone_surrogates_are_replaced_and_counted_and_pairs_are_kept(tmp_path: Path) -> None:
    path, report = tmp_path / "a.jsonl", Report()
    lines = [
        rb'{"text": "half \ud83d of a pair, \ude00 and \ud83d"}',
        rb'{"text": "\ud83d\ude00 whole, kept: \ufffd"}',
        b'{"text": "raw \xed\xa0\xbd half, and a pair \xed\xa0\xbd\xed\xb8\x80"}',
    ]
    assert read(path, b"\n".join(lines), report) == [
        "half \ufffd of a pair, \ufffd and \ufffd",
        "\U0001f600 whole, kept: \ufffd",
        "raw \ufffd half, and a pair \U0001f600",
    ]
    assert report.lines() == [f"4 lone surrogates were replaced by U+FFFD ({path}, line 1; {path}, line 3; ...)"]
    report.refuse()  # a note, no defect
    assert read(tmp_path / "a.txt", b"one \xed\xa0\xbd\n\ntwo", report) == ["one \ufffd", "two"]
    assert report.count(Kind.SURROGATE) == 5


def test_marks_line_endings_and_separators_are_text(tmp_path: Path) -> None:
    report = Report()
    content = codecs.BOM_UTF8 + '{"text": "a\\r\\nb\u2028c\x7f\x85\\u0000"}\r\n{"text": "last"}'.encode()
    assert read(tmp_path / "a", content, report) == ["a\r\nb\u2028c\x7f\x85\x00", "last"]
    assert report.lines() == []


def test_a_block_with_a_line_that_is_not_utf8_is_dropped_whole(tmp_path: Path) -> None:
    report = Report()
    content = b"first\nblock\n\nbad \xff\nblock \xfe\ngood line\n\nlast\n"
    assert read(tmp_path / "a", content, report) == ["first\nblock", "last"]
    assert report.count(Kind.NOT_UTF8) == 2


def test_every_kind_is_counted_and_five_places_of_each_are_named(tmp_path: Path) -> None:
    report, path = Report(), tmp_path / "a.jsonl"
    assert read(path, b'{"text": "a"}\n' + b"[]\n" * 7 + b"\n" * 3, report) == ["a"]
    assert report.count(Kind.NO_OBJECT) == 7 and report.count(Kind.BLANK_LINE) == 3
    with pytest.raises(ValueError, match=r"^7 lines hold no JSON object \(") as caught:
        report.refuse()
    assert str(caught.value).count("it holds an array") == 5
    assert "line 6: it holds an array; ...): write" in str(caught.value)


def test_an_empty_file_among_many_is_named_and_is_no_error(tmp_path: Path) -> None:
    report = Report()
    (tmp_path / "empty.gz").touch()
    (tmp_path / "blank.txt").write_bytes(codecs.BOM_UTF8 + b"\n \r\n")
    (tmp_path / "good.txt").write_text("good")
    files = [str(tmp_path / name) for name in ("empty.gz", "blank.txt", "good.txt")]
    assert [d.text for d in read_documents(files, "text", report)] == ["good"]
    report.refuse()
    assert report.lines() == [f"2 files without text were skipped ({files[0]}; {files[1]})"]


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra corpora")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def test_columns_of_every_type_of_string_give_the_same_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra corpora")
    texts = ["one\n\ntwo", "dr\u00e9i", "one\n\ntwo"] * 60
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), None):
        array = pyarrow.array(texts).dictionary_encode() if kind is None else pyarrow.array(texts).cast(kind)
        path = write_parquet(tmp_path / "a.json", id=list(range(180)), text=array)
        report = Report()
        documents = list(read_documents([str(path)], "text", report))
        assert [d.text for d in documents] == texts and report.lines() == []
        assert documents[99].place == f"{path}, row 100"


def test_a_group_of_rows_is_not_read_whole(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra corpora")
    path = write_parquet(tmp_path / "a", text=[random.Random(row).randbytes(8000).hex() for row in range(3000)])
    before = pyarrow.total_allocated_bytes()
    values = column_values(str(path), "text")
    assert len(str(next(values))) == 16000
    # Pages and buffers take 34 MB, whatever the number of rows; the whole group would take 82 MB.
    assert pyarrow.total_allocated_bytes() - before < 48_000_000
    values.close()


def test_defects_of_rows_and_columns_are_reported(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra corpora")
    raw = pyarrow.array([b"good", None, b"bad \xff", b"", b"half \xed\xa0\xbd"])
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 5, raw.buffers())  # a writer that does not check its strings
    path = write_parquet(tmp_path / "a.parquet", text=wrong, body=list(range(5)))
    report = Report()
    assert [d.text for d in read_documents([str(path)], "text", report)] == ["good", "half \ufffd"]
    assert report.lines() == [
        f"dropped: 1 line is not UTF-8 ({path}, row 3: 0xff is byte number 5)",
        f"dropped: 1 text is no string ({path}, row 2: 'text' is null)",
        f"1 lone surrogate was replaced by U+FFFD ({path}, row 5)",
        f"1 document without text was skipped ({path}, row 4)",
    ]
    report = Report()
    assert list(read_documents([str(path)], "body", report)) == [] and report.count(Kind.NO_STRING) == 5
    report = Report()
    assert list(read_documents([str(path)], "content", report)) == []
    with pytest.raises(ValueError, match=r"a\.parquet: its columns are 'text', 'body'\): give --json_key the name"):
        report.refuse()
    path.write_bytes(path.read_bytes()[:-20])
    report = Report()
    assert list(read_documents([str(path)], "text", report)) == []
    with pytest.raises(ValueError, match=r"1 file is damaged \(.*it cannot be read as Parquet"):
        report.refuse()
