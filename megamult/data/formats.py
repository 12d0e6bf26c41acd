"""Formats of input files, recognized by their first bytes: JSON lines, plain text, and formats to convert before use.

A file's name counts only if its content fits several formats. For example, a file that could be plain text is read as
JSON lines if its name ends in `.jsonl`, and refused if its name ends in `.csv` or `.json`.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Literal

Format = Literal["json lines", "text"]

_HEAD_BYTES = 1 << 16

_WITH_PANDAS = "write it as JSON lines, for example with pandas: {}, then to_json(orient='records', lines=True)"
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"\x1f\x8b", "gzip", "decompress it, for example with gzip -dk"),
    (b"\x28\xb5\x2f\xfd", "zstd", "decompress it, for example with zstd -d"),
    *((b"BZh%d1AY&SY" % level, "bzip2", "decompress it, for example with bzip2 -dk") for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "xz", "decompress it, for example with xz -dk"),
    (b"\x04\x22\x4d\x18", "lz4", "decompress it, for example with lz4 -d"),
    (b"PK\x03\x04", "zip", "unpack it, for example with unzip"),
    (b"PAR1\x15", "Parquet", _WITH_PANDAS.format("read_parquet")),
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
_TAR_AT = 257
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv")

# Beginnings of JSON documents that are not JSON lines. Plain text may begin with a bracket, but not like this.
_JSON_DOCUMENT = re.compile(r'\{\s*"|\[\s*[\[{]*\s*"|\[\s*\{|[\[{]\s*$')
_TABLE_HEADER = re.compile(r'"?\w+"?(?:([,\t;])"?\w+"?)(?:\1"?\w+"?)*$')


def recognize(path: str, json_key: str) -> Format:
    """Return the format of the file `path`, which must not be empty.

    Raises:
        ValueError: the format is not supported. The message names it and says how to convert the file.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
        complete = len(head) < _HEAD_BYTES
    _refuse_binary(path, head)
    suffix = Path(path).suffix.lower()
    head = head.removeprefix(codecs.BOM_UTF8)
    text = head.decode("utf-8", errors="replace").lstrip()
    line, newline, _ = text.partition("\n")
    line = line.rstrip()
    longer_than_head = not newline and not complete
    if _is_object(line) or (longer_than_head and re.match(r'\{\s*"', line)):
        return "json lines"
    if suffix in _LINES_SUFFIXES:
        return "json lines"  # the reader then names the line of the first mistake
    if _JSON_DOCUMENT.match(text if line in ("[", "{", "[{") else line):
        kind = "one JSON array" if text.startswith("[") else "a JSON object over several lines, or damaged JSON"
        raise ValueError(
            f"input {path} looks like {kind}, not one JSON object per line: write it as JSON lines, for example with "
            f"jq -c {'.[]' if text.startswith('[') else '.'}"
        )
    if suffix == ".json" and line:
        raise ValueError(
            f"input {path} begins with {line[:20]!r}, which is no JSON object: write one object per line, or "
            "rename the file if it is plain text"
        )
    if suffix in _TABLE_SUFFIXES or _is_table(line, json_key):
        raise ValueError(f"input {path} is a table ({line[:40]!r}): {_WITH_PANDAS.format('read_csv')}")
    return "text"


def _refuse_binary(path: str, head: bytes) -> None:
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            raise ValueError(f"input {path} is {name}, by its first bytes: {remedy}")
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        raise ValueError(f"input {path} is a tar archive, by its first bytes: unpack it, for example with tar -xf")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(line: str, json_key: str) -> bool:
    """Tell whether a line looks like the header of a table that has a column `json_key`."""
    return _TABLE_HEADER.match(line) is not None and json_key in re.split(r"[\W]+", line)
