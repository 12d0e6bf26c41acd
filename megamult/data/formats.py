"""Formats of input files, recognized by their first bytes.

JSON lines, text and Parquet are read. Other known formats are refused, with a message that says how to convert the
file.

A file's name counts only if its content fits several formats. For example, a file that could be plain text is read as
JSON lines if its name ends in `.jsonl`, and refused if its name ends in `.csv` or `.json`.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Literal

from megamult.data.compression import compression

Format = Literal["JSON lines", "plain text", "Parquet"]

HEAD_BYTES = 1 << 16
"""Number of bytes at the start of a file by which its format is recognized."""

_WITH_PANDAS = "write it as JSON lines, for example with pandas: {}, then to_json(orient='records', lines=True)"
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"\x04\x22\x4d\x18", "lz4", "decompress it, for example with lz4 -d"),
    (b"PK\x03\x04", "zip", "unpack it, for example with unzip"),
    (b"ARROW1\x00", "Arrow", _WITH_PANDAS.format("read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as JSON lines, for example by to_json of the library datasets"),
    (b"Obj\x01", "Avro", "write it as JSON lines"),
    (b"\x89HDF\r\n\x1a\n", "HDF5", "write its text as JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "write its text as JSON lines"),
    (b"\x93NUMPY", "a numpy array", "give the text that it was made from"),
    (b"%PDF-", "PDF", "extract its text first"),
    (b"MMIDIDX\x00", "a Megatron index", "it is encoded already: give its prefix to data.train"),
    (codecs.BOM_UTF32_LE, "UTF-32", "convert it, for example with iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16", "convert it, for example with iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16", "convert it, for example with iconv -f UTF-16 -t UTF-8"),
]
_PARQUET = b"PAR1\x15"
_TAR_AT = 257
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv")

# Beginnings of JSON documents that are not JSON lines. Plain text may begin with a bracket, but not like this.
_JSON_DOCUMENT = re.compile(r'\{\s*"|\[\s*[\[{]*\s*"|\[\s*\{|[\[{]\s*$')
_TABLE_HEADER = re.compile(r'"?\w+"?(?:([,\t;])"?\w+"?)(?:\1"?\w+"?)*$')


class UnknownFormat(Exception):
    """A file has a format that is not read. The message names the format and says how to convert the file."""


def recognize(name: str, head: bytes, compressed: str | None, json_key: str) -> Format:
    """Return the format of a file, without regard to its compression.

    Args:
        name: the file's name.
        head: the first `HEAD_BYTES` bytes of its content, or all of its content if that is less.
        compressed: name of the compression, or None.
        json_key: field of a JSON line that has the text.

    Raises:
        UnknownFormat: the file is not read in this format.
    """
    if head.startswith(_PARQUET) and not compressed:
        return "Parquet"
    _refuse_binary(head, compressed)
    # A compressed file is named `a.jsonl.gz`, and sometimes `a.jsonl` all the same.
    suffix = Path(name).suffix.lower()
    if compressed and suffix not in (*_LINES_SUFFIXES, *_TABLE_SUFFIXES, ".json"):
        suffix = Path(Path(name).stem).suffix.lower()
    complete = len(head) < HEAD_BYTES
    head = head.removeprefix(codecs.BOM_UTF8)
    text = head.decode("utf-8", errors="replace").lstrip()
    line, newline, _ = text.partition("\n")
    line = line.rstrip()
    longer_than_head = not newline and not complete
    if _is_object(line) or (longer_than_head and re.match(r'\{\s*"', line)):
        return "JSON lines"
    if suffix in _LINES_SUFFIXES:
        return "JSON lines"  # the reader then names the line of the first mistake
    if _JSON_DOCUMENT.match(text if line in ("[", "{", "[{") else line):
        kind = "one JSON array" if text.startswith("[") else "a JSON object over several lines, or damaged JSON"
        raise UnknownFormat(
            f"it looks like {kind}, not one JSON object per line: write it as JSON lines, for example with "
            f"jq -c {'.[]' if text.startswith('[') else '.'}"
        )
    if suffix == ".json" and line:
        raise UnknownFormat(
            f"it begins with {line[:20]!r}, which is no JSON object: write one object per line, or rename the file if "
            "it is plain text"
        )
    if suffix in _TABLE_SUFFIXES or _is_table(line, json_key):
        raise UnknownFormat(f"it is a table ({line[:40]!r}): {_WITH_PANDAS.format('read_csv')}")
    return "plain text"


def _refuse_binary(head: bytes, compressed: str | None) -> None:
    if compressed and (head.startswith(_PARQUET) or compression(head)):
        content = "Parquet" if head.startswith(_PARQUET) else compression(head)
        raise UnknownFormat(f"it is {content} within {compressed}, by its first bytes: decompress it once")
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            raise UnknownFormat(f"it is {name}, by its first bytes: {remedy}")
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        raise UnknownFormat("it is a tar archive, by its first bytes: unpack it, for example with tar -xf")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(line: str, json_key: str) -> bool:
    """Tell whether a line looks like the header of a table that has a column `json_key`."""
    return _TABLE_HEADER.match(line) is not None and json_key in re.split(r"[\W]+", line)
