"""Compressed files, recognized by their first bytes and read as streams of the bytes that they contain."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from megamult.data.extras import load

# More at once would need more memory where a compressed text repeats itself: gzip packs at most 1032 bytes into one.
_READ_BYTES = 1 << 14
_BUFFER_BYTES = 1 << 20


class DamagedFile(Exception):
    """The content of a file cannot be read to its end."""


class _Decompressor(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def _zstd() -> _Decompressor:
    # `zstd --long=31` writes the largest windows; by default the library refuses those of more than 128 MiB.
    decompressor: Any = load("zstandard").ZstdDecompressor(max_window_size=1 << 31)
    started: _Decompressor = decompressor.decompressobj()
    return started


_MAGIC: list[tuple[bytes, str, Callable[[], _Decompressor]]] = [
    (b"\x1f\x8b", "gzip", lambda: zlib.decompressobj(wbits=31)),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    # pzstd begins its files with a frame that has no content. The last four bits of its mark are free.
    *((bytes([0x50 + number]) + b"\x2a\x4d\x18", "zstd", _zstd) for number in range(16)),
    # The level, and then the mark of a block, or of the end if there is none.
    *(
        (b"BZh%d" % level + mark, "bzip2", bz2.BZ2Decompressor)
        for level in range(1, 10)
        for mark in (b"1AY&SY", b"\x17rE8P\x90")
    ),
    (b"\xfd7zXZ\x00", "xz", lzma.LZMADecompressor),
]


def compression(head: bytes) -> str | None:
    """Return the name of the compression of a file that begins with `head`, or None if it is not compressed."""
    return next((name for magic, name, _ in _MAGIC if head.startswith(magic)), None)


def open_decompressed(path: str) -> tuple[io.BufferedReader[Any], str | None]:
    """Open a file that may be compressed; return the stream of its content and the name of the compression.

    The stream reads a file of several compressed parts, one after the other, as all of their contents. It raises
    `DamagedFile` where the file is damaged or ends within a part.

    Raises:
        MissingLibrary: the library that the compression needs is not installed.
        OSError: the file cannot be read.
    """
    raw = io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)
    head = raw.peek(16)
    for magic, name, start in _MAGIC:
        if head.startswith(magic):
            try:
                return io.BufferedReader(_Content(raw, start), _BUFFER_BYTES), name
            except BaseException:
                raw.close()
                raise
    return raw, None


class _Content(io.RawIOBase):
    """Content of a compressed file. The libraries' own readers do not all notice that a file is cut off."""

    def __init__(self, raw: io.BufferedReader[Any], start: Callable[[], _Decompressor]) -> None:
        super().__init__()
        self._raw = raw
        self._start = start
        self._part: _Decompressor | None = start()
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._raw.read(_READ_BYTES)
            self._rest = b""
            if not packed:
                if self._part is not None:
                    raise DamagedFile("the compressed content is cut off")
                return 0
            self._ready = memoryview(self._decompressed(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, packed: bytes) -> bytes:
        try:
            if self._part is None:
                self._part = self._start()
            content = self._part.decompress(packed)
        except MemoryError:
            raise
        except Exception as error:  # each library has errors of its own
            raise DamagedFile(f"the compressed content is damaged ({error})") from None
        if self._part.eof:
            self._rest, self._part = self._part.unused_data, None
        return content
