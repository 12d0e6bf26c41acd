"""Documents read one by one from files of text, JSON lines and Parquet, and a report of what is not read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader

from megamult.data.compression import DamagedFile, open_decompressed
from megamult.data.defects import Kind, Report
from megamult.data.extras import MissingLibrary
from megamult.data.formats import HEAD_BYTES, Format, UnknownFormat, recognize
from megamult.data.parquet import NoColumn, column_values

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        place: where it starts: `file, line 7`, or `file, row 7` of a Parquet file. Both count from 1.
        text: the text.
        size: number of UTF-8 bytes of the text.
    """

    place: str
    text: str
    size: int


def read_documents(files: Iterable[str], json_key: str, report: Report) -> Iterator[Document]:
    """Yield the documents of all files in order, and add to `report` what is left out and what is changed.

    In a file of JSON lines, whatever its name, each line is an object that has the text under `json_key`. In a Parquet
    file the text is in the column `json_key`. Any other file is plain text. There a document is a block of non-blank
    lines, without the line ending of its last line; a block with a line that is not UTF-8 is left out. A byte-order
    mark at the start of a file is removed. A lone surrogate is replaced by U+FFFD. Otherwise the text is not changed.

    If a file is damaged, documents before the damage is found are still yielded, and may be wrong: gzip's checksum, for
    example, stands at the end.
    """
    for path in files:
        try:
            yield from _read(path, json_key, report)
        except MissingLibrary as error:
            report.add(Kind.MISSING, path, str(error))
        except UnknownFormat as error:
            report.add(Kind.FORMAT, path, str(error))
        except NoColumn as error:
            report.add(Kind.NO_FIELD, path, f"its columns are {error}")
        except DamagedFile as error:
            report.add(Kind.DAMAGED, path, str(error))
        except OSError as error:
            report.add(Kind.MISSING, path, f"cannot be read ({error.strerror}): check its disk")


def _read(path: str, json_key: str, report: Report) -> Iterator[Document]:
    form = format_of(path, json_key)
    if form is None:
        report.add(Kind.EMPTY_FILE, path)
        return
    report.add_file(form, path)
    if form == "Parquet":
        yield from _parquet_documents(path, json_key, report)
        return
    stream, _ = open_decompressed(path)
    with stream:
        yield from (_json_documents if form == "JSON lines" else _text_blocks)(path, stream, json_key, report)


def format_of(path: str, json_key: str) -> Format | None:
    """Return the format of a file, or None if it has no text.

    Raises:
        UnknownFormat: the format is not read. The message names it and says how to convert the file.
        DamagedFile, MissingLibrary, OSError: the file cannot be read.
    """
    stream, compressed = open_decompressed(path)
    head = b""
    with stream:
        try:
            while len(head) < HEAD_BYTES and (more := stream.read1(HEAD_BYTES - len(head))):
                head += more
        except DamagedFile:
            if not head:
                raise
    return recognize(path, head, compressed, json_key) if head else None


def _text_blocks(path: str, stream: BufferedReader, json_key: str, report: Report) -> Iterator[Document]:
    block: list[str] = []
    start, good, empty = 0, True, True
    for number, line in enumerate(stream, start=1):
        text = _decoded(_without_mark(line, number), f"{path}, line {number}", report)
        if text is None or not _is_blank(text):
            start = start if block else number
            good = good and text is not None
            block.append(text or "")
            empty = False
        elif block:
            if good:
                yield _document(f"{path}, line {start}", _without_ending(block), report)
            block, good = [], True
    if block and good:
        yield _document(f"{path}, line {start}", _without_ending(block), report)
    if empty:
        report.add(Kind.EMPTY_FILE, path)


def _without_ending(lines: list[str]) -> str:
    return "".join(lines).removesuffix("\n").removesuffix("\r")


def _json_documents(path: str, stream: BufferedReader, json_key: str, report: Report) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        document = _json_document(path, number, line, json_key, report)
        if document is not None:
            yield document


def _json_document(path: str, number: int, line: bytes, json_key: str, report: Report) -> Document | None:
    place = f"{path}, line {number}"
    text = _decoded(_without_mark(line, number), place, report)
    if text is None:
        return None
    if _is_blank(text):
        report.add(Kind.BLANK_LINE, place)
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.add(Kind.INVALID_JSON, place, str(error))
        return None
    if not isinstance(record, dict):
        report.add(Kind.NO_OBJECT, place, f"it holds {_json_type(record)}")
        return None
    if json_key not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        report.add(Kind.NO_FIELD, place, f"it has no {json_key!r}; its fields are {names}")
        return None
    return _checked_text(place, record[json_key], json_key, report)


def _parquet_documents(path: str, json_key: str, report: Report) -> Iterator[Document]:
    for number, value in enumerate(column_values(path, json_key), start=1):
        place = f"{path}, row {number}"
        if isinstance(value, bytes):
            value = _decoded(value, place, report)
            if value is None:
                continue
        document = _checked_text(place, value, json_key, report)
        if document is not None:
            yield document


def _checked_text(place: str, value: object, json_key: str, report: Report) -> Document | None:
    if not isinstance(value, str):
        report.add(Kind.NO_STRING, place, f"{json_key!r} is {_json_type(value)}")
    elif _is_blank(value):
        report.add(Kind.EMPTY_DOCUMENT, place)
    else:
        return _document(place, value, report)
    return None


def _document(place: str, text: str, report: Report) -> Document:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        before = text.count(_REPLACEMENT)
        # UTF-16 has surrogates, so it joins the two halves of a pair and finds only the lone ones invalid.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        report.add(Kind.SURROGATE, place, count=text.count(_REPLACEMENT) - before)
        size = len(text.encode())
    return Document(place, text, size)


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _decoded(content: bytes, place: str, report: Report) -> str | None:
    """Return bytes as text. If they are not UTF-8, report this with `place`, their file and line, and return None."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        detail = f"0x{content[error.start]:02x} is byte number {error.start + 1}"
    try:
        return content.decode("utf-8", "surrogatepass")  # some programs write surrogates as if they were characters
    except UnicodeDecodeError:
        report.add(Kind.NOT_UTF8, place, detail)
        return None


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
