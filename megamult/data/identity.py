"""Digests that identify a corpus independently of the path of its files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megamult.data.indexed import IndexedFiles, blocks

_STARTS = 65536
_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Identity:
    """Digests that distinguish a corpus from others.

    Attributes:
        order: digest of the token type, the numbers of tokens and documents, and the positions where up to 65,536
            evenly spaced documents start. It seeds the order of a run's samples. It does not depend on the text:
            corpora whose documents have the same lengths share it.
        contents: digest of the token type, the numbers of tokens and documents, and 16 evenly spaced blocks of 4 KiB of
            each file, so it depends on token ids too. A resumed run recognizes its sources by this digest.
    """

    order: str
    contents: str


def order_digest(files: IndexedFiles) -> str:
    """Compute `Identity.order` of an indexed dataset.

    This reads all pointers of the .idx if there are fewer than 65,536, and evenly spaced ones otherwise.
    """
    digest = hashlib.sha256(f"{files.dtype.__name__} {files.tokens} {files.sequences}".encode())
    digest.update(files.pointers()[:: 1 + files.sequences // _STARTS].tobytes())
    return digest.hexdigest()


def contents_digest(files: IndexedFiles) -> str:
    """Compute `Identity.contents` of an indexed dataset. This reads at most 128 KiB."""
    digest = hashlib.sha256(f"{files.dtype.__name__} {files.tokens} {files.sequences}".encode())
    for file in (files.bin, files.idx):
        with open(file, "rb", buffering=0) as stream:
            for start, stop in blocks(file.stat().st_size, _BLOCK_BYTES):
                stream.seek(start)
                digest.update(stream.read(stop - start))
    return digest.hexdigest()
