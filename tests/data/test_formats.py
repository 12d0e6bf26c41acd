"""Inputs are known by their content: JSON lines under any name, text that only looks like JSON, and what is refused."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest

from megamult.data.defects import Report
from megamult.data.documents import read_documents

TEXTS = ["first document", "second\n\nwith a blank line", "third, with [brackets] and {braces}"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def read(tmp_path: Path, name: str, content: bytes | str, key: str = "text") -> list[str]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    report = Report()
    texts = [document.text for document in read_documents([str(path)], key, report)]
    report.refuse()
    return texts


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.JSONL", "a.csv", "a.txt", "a", "a.jsonl"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_read_under_any_name(tmp_path: Path, name: str, start: bytes) -> None:
    assert read(tmp_path, name, start + LINES.encode()) == TEXTS


def test_a_first_line_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    long = "word " * 100_000
    line = json.dumps({"text": long})
    for first in (line, line.replace("{", "{ ")):
        assert read(tmp_path, "a.txt", first + "\n" + LINES) == [long, *TEXTS]


@pytest.mark.parametrize(
    "text",
    [
        "{{Infobox person}}\nname",
        "[[Main page]] of a wiki",
        "[1] A reference\n[2] another",
        "{ braces } in prose",
        "apples, pears and text, all of them",
        "BZhang wrote this",
        "ORCHESTRA",
        '"Quoted," she said',
        "12",
    ],
)
def test_text_that_only_looks_like_something_else_is_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "a.txt", text) == [text]


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return out.getvalue()


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "zip": ("a.txt", zipped(), "is zip, by its first bytes: unpack it"),
    "lz4": ("a.jsonl.lz4", b"\x04\x22\x4d\x18\x04\x00", "is lz4, by its first bytes: decompress it"),
    "arrow": ("a", b"ARROW1\x00\x00", "is Arrow, by its first bytes"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "is UTF-16, by its first bytes: convert it"),
    "index": ("a.idx", b"MMIDIDX\x00\x00", "is a Megatron index"),
    "array": (
        "a.json",
        json.dumps([{"text": t} for t in TEXTS]).encode(),
        "looks like one JSON array, not one JSON object per",
    ),
    "indented array": ("a.txt", json.dumps([{"text": "a"}], indent=2).encode(), "looks like one JSON array"),
    "array of strings": ("a.json", json.dumps(TEXTS).encode(), "for example with jq -c .[]"),
    "indented object": (
        "a.txt",
        json.dumps({"text": "a"}, indent=2).encode(),
        "looks like a JSON object over several lines",
    ),
    "object in parts": ("a.json", b'{"text": "a",\n "id": 1}\n', "for example with jq -c ."),
    "no JSON": ("a.json", b"plain words\n", "begins with 'plain words', which is no JSON object"),
    "table by name": ("a.csv", b"a;b\n1;2\n", "is a table ('a;b')"),
    "table by header": ("a.txt", b"id\ttext\n1\tone\n", "is a table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_here_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path, file, content)
    assert str(caught.value).startswith(f"1 file has a format that is not read ({tmp_path / file}: it ")
