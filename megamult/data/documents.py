"""Documents read one by one from files of text and of JSON lines, with errors that name file and line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamult.data.formats import recognize


@dataclass(frozen=True)
class Document:
    """One document and the place where it starts (`line` counts from 1)."""

    path: str
    line: int
    text: str


def read_documents(paths: Iterable[str | Path], json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of all files in order.

    In a file of JSON lines, whatever its name, each line is an object that has the text under `json_key`. Any other
    file is plain text. There a document is a block of non-blank lines, without the line ending of its last line. A
    byte-order mark at the start of a file is removed. Otherwise the text is not changed.

    Raises:
        ValueError: a file is missing, empty, not UTF-8 or in a format that is not supported (see `recognize`); a JSON
            line is blank or invalid; or its field `json_key` is missing, is not a string or has no text.
    """
    for path in map(str, paths):
        # Every file is read more than once: first to check it, later to encode it. A pipe can be read only once.
        if not Path(path).is_file():
            fact = "is not a regular file" if Path(path).exists() else "does not exist"
            raise ValueError(f"input {path} {fact}: give the path of a file of text or JSON lines")
        try:
            if Path(path).stat().st_size == 0:
                raise ValueError(f"input {path} is empty (0 bytes): remove it from the inputs or fill it")
            form = recognize(path, json_key)
        except OSError as error:
            raise ValueError(f"cannot read input {path} ({error.strerror}): check its permissions") from None
        lines = _decoded_lines(path)
        if form == "json lines":
            yield from _json_documents(path, lines, json_key)
        else:
            yield from _text_blocks(path, lines)


def _decoded_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its ending).

    Lines are split before they are decoded, so that a decoding error can name its line.
    """
    number = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not UTF-8 (0x{line[error.start]:02x} is byte number "
                        f"{error.start + 1} of the line): convert the file, for example with iconv -t UTF-8"
                    ) from None
    except OSError as error:
        raise ValueError(f"cannot read input {path} ({error.strerror}): check its permissions") from None


def _text_blocks(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[Document]:
    block: list[str] = []
    start, found = 0, False
    for number, line in lines:
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield _block(path, start, block)
            block, found = [], True
    if block:
        yield _block(path, start, block)
    elif not found:
        raise ValueError(f"input {path} is empty (blank lines only): remove it from the inputs or fill it")


def _block(path: str, start: int, lines: list[str]) -> Document:
    return Document(path, start, "".join(lines).removesuffix("\n").removesuffix("\r"))


def _json_documents(path: str, lines: Iterable[tuple[int, str]], json_key: str) -> Iterator[Document]:
    for number, line in lines:
        where = f"{path}, line {number}"
        if not line.strip():
            raise ValueError(f"{where}: the line is blank, but every line must hold one JSON object: delete the line")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: invalid JSON ({error}): write one JSON object per line") from None
        if not isinstance(record, dict):
            raise ValueError(
                f'{where}: the line holds a JSON {type(record).__name__}, not an object: write {{"{json_key}": "..."}}'
            )
        if json_key not in record:
            names = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(
                f"{where}: the object has no field {json_key!r} (its fields: {names}): give --json_key the name of "
                "the field that holds the text"
            )
        text = record[json_key]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {json_key!r} is a {type(text).__name__}, not a string: make it a string")
        if not text.strip():
            raise ValueError(f"{where}: field {json_key!r} has no text ({text[:20]!r}): remove the line")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: field {json_key!r} is not valid Unicode (lone surrogate at character "
                f"{error.start}): repair it"
            ) from None
        yield Document(path, number, text)
