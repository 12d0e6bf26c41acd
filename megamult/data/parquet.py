"""Texts in a column of a Parquet file, read in batches of rows so that memory does not grow with the file."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from megamult.data.compression import DamagedFile
from megamult.data.extras import load

_ROWS = 64
_BUFFER_BYTES = 1 << 20


class NoColumn(Exception):
    """A file does not have the column. The text of the exception lists the columns that the file has."""


def column_values(path: str, column: str) -> Generator[object, None, None]:
    """Yield the values of a column: a string as str, or as bytes if it is not UTF-8; null as None; a value of another
    type as pyarrow converts it to Python.

    Raises:
        MissingLibrary: pyarrow is not installed.
        NoColumn: the file does not have the column.
        DamagedFile: the file cannot be read to its end.
    """
    pyarrow, parquet = load("pyarrow"), load("pyarrow.parquet")
    try:
        # Without a buffer size a group of rows is read whole, and writers put up to a million rows into a group.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise NoColumn(", ".join(map(repr, names[:8])) or "none")
            for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0):
                    yield _python(value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(f"it cannot be read as Parquet ({' '.join(str(error).split())})") from None


def _python(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return bytes(value.as_buffer())
