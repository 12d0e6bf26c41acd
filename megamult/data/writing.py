"""Writing of Megatron's indexed datasets (`megamult.data.indexed` has the layout), one document after the other.

Megatron's own builder keeps Python lists of all documents. Here memory does not grow with the number of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from megamult.data.indexed import HEADER, MAGIC, TOKEN_TYPES

_CHUNK = 1 << 20
_SMALL_VOCABULARY = 65500


class IndexedWriter:
    """Writer of PREFIX.bin and PREFIX.idx. It is a context, at whose end the .idx is complete.

    Token ids have 16 bits if the vocabulary has fewer than 65,500 tokens, as in Megatron, and 32 bits otherwise.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.documents = 0
        self._length = 0  # tokens so far of the document that has not ended
        self._idx = prefix.with_name(f"{prefix.name}.idx")
        self._dtype: type[np.integer] = np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32
        self._bin = open(prefix.with_name(f"{prefix.name}.bin"), "wb")  # noqa: SIM115
        self._lengths = open(prefix.with_name(f"{prefix.name}.lengths"), "w+b")  # noqa: SIM115

    def add(self, ids: np.ndarray, last: bool) -> None:
        """Append token ids of a document, which ends with them if `last` is true."""
        self._bin.write(ids.astype(self._dtype).data)
        self._length += len(ids)
        if last:
            if self._length >= 2**31:
                raise ValueError(
                    f"document number {self.documents} (from 0) of {self._idx.stem} has {self._length} tokens, and an "
                    ".idx can hold only lengths below 2**31: split the document (in plain text, insert blank lines)"
                )
            self._lengths.write(np.int32(self._length).tobytes())
            self.documents += 1
            self._length = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._bin, self._lengths:
            if error is None:
                self._lengths.flush()
                self._write_idx()
        Path(self._lengths.name).unlink()

    def _write_idx(self) -> None:
        code = next(code for code, dtype in TOKEN_TYPES.items() if dtype is self._dtype)
        with open(self._idx, "wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))
            for lengths in self._chunks():
                idx.write(lengths.data)
            byte = 0
            for lengths in self._chunks():
                sizes = lengths.astype("<i8") * np.dtype(self._dtype).itemsize
                ends = byte + np.cumsum(sizes)
                idx.write((ends - sizes).data)
                byte = int(ends[-1])
            for first in range(0, self.documents + 1, _CHUNK):
                idx.write(np.arange(first, min(first + _CHUNK, self.documents + 1), dtype="<i8").data)

    def _chunks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while len(chunk := np.frombuffer(self._lengths.read(4 * _CHUNK), "<i4")):
            yield chunk
