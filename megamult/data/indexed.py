"""Checks and statistics of Megatron's indexed datasets: token ids in a `.bin`, where they are in an `.idx`.

The layout of an `.idx`, little endian: magic (9 bytes), version (u64), token type (u8), number of sequences
S (u64), number of document bounds D (u64), lengths (i32[S], tokens), pointers (i64[S], bytes into the .bin),
bounds (i64[D], sequences). Read here without Megatron, whose own reader answers damage with assertions or
numpy errors.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK_TOKENS = 1 << 22
_REMEDY = "copy the pair again or rerun launch/prepare_data.py"


@dataclass(frozen=True)
class IndexedFiles:
    """Two files that fit each other; `pointers` are the byte offsets of the sequences in the .bin."""

    prefix: str
    dtype: type[np.integer]
    tokens: int
    sequences: int
    documents: int
    pointers: np.ndarray

    def chunks(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position of the first token, token ids) over the .bin, memory-mapped: every n-th chunk from the
        k-th on, for share (k, n)."""
        if self.tokens:
            ids = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", shape=(self.tokens,))
            for start in range(share[0] * _CHUNK_TOKENS, self.tokens, share[1] * _CHUNK_TOKENS):
                yield start, ids[start : start + _CHUNK_TOKENS]


def read_index(prefix: str | Path) -> IndexedFiles:
    """Open PREFIX.idx and check it against PREFIX.bin without reading a token: magic, type, lengths, sizes.

    Raises:
        ValueError: one of the files is missing, damaged, or they do not belong together.
    """
    prefix = str(prefix)
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise ValueError(
                f"data file {file} does not exist; give a prefix without .bin or .idx, as "
                "launch/prepare_data.py wrote it"
            )
    size = idx.stat().st_size
    with open(idx, "rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise ValueError(f"{idx} is not a Megatron index: it starts with {header[:9]!r}, not {_MAGIC!r}; {_REMEDY}")
    if len(header) < _HEADER.size:
        raise ValueError(f"{idx} is cut off: {size} bytes, its header alone has {_HEADER.size}; {_REMEDY}")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _TOKEN_TYPES:
        raise ValueError(
            f"{idx} has version {version} and token type code {code}, but version 1 and an integer type "
            f"({', '.join(map(str, _TOKEN_TYPES))}) are read; {_REMEDY}"
        )
    if size < _HEADER.size + 12 * sequences + 8 * bounds:
        raise ValueError(
            f"{idx} is cut off: {size} bytes, but {sequences} sequences and {bounds} document bounds "
            f"take {_HEADER.size + 12 * sequences + 8 * bounds}; {_REMEDY}"
        )
    dtype = _TOKEN_TYPES[code]
    table = np.memmap(idx, np.uint8, "r")
    at = _HEADER.size
    lengths = np.frombuffer(table, np.dtype("<i4"), sequences, at)
    pointers = np.frombuffer(table, np.dtype("<i8"), sequences, at + 4 * sequences)
    document_bounds = np.frombuffer(table, np.dtype("<i8"), bounds, at + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    expected = int(ends[-1]) if sequences else 0
    starts = np.concatenate((np.zeros(1, np.int64), ends))[:-1]
    wrong = np.flatnonzero((lengths < 0) | (pointers != starts))
    if len(wrong):
        n = int(wrong[0])
        raise ValueError(
            f"{idx} is damaged: sequence {n} has length {lengths[n]} at byte {pointers[n]}, "
            f"which does not follow sequence {n - 1}; {_REMEDY}"
        )
    if bounds == 0 or document_bounds[-1] != sequences:
        raise ValueError(f"{idx} is damaged: {bounds} document bounds do not end at sequence {sequences}; {_REMEDY}")
    actual = bin_.stat().st_size
    if actual != expected:
        raise ValueError(
            f"{bin_} has {actual} bytes, but {idx} describes {expected}: the file is "
            f"{'cut off' if actual < expected else 'longer than its index or belongs to another one'}; "
            f"{_REMEDY}"
        )
    tokens = expected // np.dtype(dtype).itemsize
    return IndexedFiles(prefix, dtype, tokens, sequences, max(bounds - 1, 0), pointers)


def validate_indexed(prefix: str | Path, vocab_size: int, share: tuple[int, int] = (0, 1)) -> IndexedFiles:
    """Check an indexed dataset whole: what `read_index` checks, and each token id against the vocabulary.

    The scan reads the .bin once through a memory map, at the disk's speed or at about 1 GB per second from the
    page cache. In a distributed run rank k of n reads the share (k, n).

    Raises:
        ValueError: the files do not fit each other, or a token id lies outside [0, vocab_size).
    """
    files = read_index(prefix)
    for start, ids in files.chunks(share):
        low, high = int(ids.min()), int(ids.max())
        if low >= 0 and high < vocab_size:
            continue
        position = start + int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        byte = position * np.dtype(files.dtype).itemsize
        # The last sequence that starts at or before this token: an empty one shares its successor's pointer.
        sequence = int(np.searchsorted(files.pointers, byte, side="right")) - 1
        raise ValueError(
            f"{prefix}.bin: token id {int(ids[position - start])} at token {position} (document {sequence}) "
            f"is outside the vocabulary of {vocab_size}; use the tokenizer that the corpus was prepared "
            "with, or prepare it again"
        )
    return files


def unigram_entropy(prefix: str | Path, vocab_size: int) -> float:
    """Entropy of the empirical token distribution, -sum_t p_t ln p_t with p_t = count_t / tokens, in nats
    per token.

    It is the loss of the best model that ignores context: what a language model must beat. `vocab_size`
    bounds the ids.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for _, ids in read_index(prefix).chunks():
        counts += np.bincount(ids, minlength=vocab_size)
    p = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(p * np.log(p)).sum()) + 0.0
