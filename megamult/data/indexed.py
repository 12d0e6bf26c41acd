"""Checks and statistics of Megatron's indexed datasets. Token ids are in a `.bin`, and their positions in an `.idx`.

An `.idx` contains, in little endian: magic (9 bytes), version (u64), token type (u8), number of sequences S (u64),
number of document bounds D (u64), lengths (i32[S], tokens), pointers (i64[S], bytes into the .bin), bounds (i64[D],
sequences). This module reads it without Megatron, whose reader answers damage with assertions or numpy errors.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Token types by their codes in the header of an .idx."""

PIECE_BYTES = 1 << 28
"""Bytes of a piece of a file. Each piece has its own checksum, so that several processes can check one file."""

_CHUNK_TOKENS = 1 << 22
_CHUNK_SEQUENCES = 1 << 20
_BLOCKS = 16
_REMEDY = "copy the pair again or rerun launch/prepare_data.py"


@dataclass(frozen=True)
class IndexedFiles:
    """A .bin and an .idx that fit each other. Their contents are not kept in memory: methods read what they return."""

    prefix: str
    dtype: type[np.integer]
    tokens: int
    sequences: int
    documents: int

    @property
    def bin(self) -> Path:
        """Path of the file with the token ids."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        """Path of the file that says where each sequence is."""
        return Path(f"{self.prefix}.idx")

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each sequence, i32[sequences], memory-mapped."""
        return self._table("<i4", self.sequences, 0)

    def pointers(self) -> np.ndarray:
        """Return the number of bytes of the .bin before each sequence, i64[sequences], memory-mapped."""
        return self._table("<i8", self.sequences, 4 * self.sequences)

    def bounds(self) -> np.ndarray:
        """Return the number of sequences before each document, and at the end the number of all sequences.

        The result is i64[documents + 1], memory-mapped.
        """
        return self._table("<i8", self.documents + 1, 12 * self.sequences)

    def last_token(self) -> int:
        """Return the last token id of the .bin."""
        return int(np.fromfile(self.bin, self.dtype, 1, offset=(self.tokens - 1) * np.dtype(self.dtype).itemsize)[0])

    def _table(self, dtype: str, count: int, at: int) -> np.ndarray:
        return np.memmap(self.idx, dtype, "r", offset=HEADER.size + at, shape=(count,))

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the tokens [first, last) of the .bin in chunks of at most `_CHUNK_TOKENS`.

        A chunk is (position of its first token in the .bin, token ids).
        """
        last = self.tokens if last is None else min(last, self.tokens)
        itemsize = np.dtype(self.dtype).itemsize
        # The file is read, not mapped: the pages of a mapped file would count as this process's memory.
        for start in range(first, last, _CHUNK_TOKENS):
            count = min(_CHUNK_TOKENS, last - start)
            yield start, np.fromfile(self.bin, self.dtype, count, offset=start * itemsize)


def read_index(prefix: str | Path) -> IndexedFiles:
    """Open PREFIX.idx and check that it fits PREFIX.bin.

    The check covers the magic, the token type, the lengths of both files, and the end of the last sequence. It takes a
    few small reads, whatever the size of the files.

    Raises:
        ValueError: a file is missing or damaged, or the files do not belong together.
    """
    prefix = str(prefix)
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise ValueError(
                f"data file {file} does not exist: give the prefix, without .bin or .idx, of files that "
                "launch/prepare_data.py wrote"
            )
    size = idx.stat().st_size
    with open(idx, "rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise ValueError(f"{idx} is not a Megatron index: it starts with {header[:9]!r}, not {MAGIC!r}: {_REMEDY}")
    if len(header) < HEADER.size:
        raise ValueError(f"{idx} is cut off: {size} bytes, but its header takes {HEADER.size}: {_REMEDY}")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != 1 or code not in TOKEN_TYPES:
        raise ValueError(
            f"{idx} has version {version} and token type code {code}, but must have version 1 and the code of an "
            f"integer type ({', '.join(map(str, TOKEN_TYPES))}): {_REMEDY}"
        )
    if size < HEADER.size + 12 * sequences + 8 * bounds:
        raise ValueError(
            f"{idx} is cut off: {size} bytes, but {sequences} sequences and {bounds} document bounds "
            f"take {HEADER.size + 12 * sequences + 8 * bounds}: {_REMEDY}"
        )
    dtype = TOKEN_TYPES[code]
    itemsize = np.dtype(dtype).itemsize
    files = IndexedFiles(prefix, dtype, 0, sequences, max(bounds - 1, 0))
    if bounds == 0 or _number(idx, "<i8", 12 * sequences + 8 * (bounds - 1)) != sequences:
        fact = f"the last of its {bounds} document bounds is not its number of sequences, {sequences}"
        raise ValueError(f"{idx} is damaged: {fact if bounds else 'it has no document bounds'}: {_REMEDY}")
    expected = 0
    if sequences:
        length, pointer = _number(idx, "<i4", 4 * (sequences - 1)), _number(idx, "<i8", 12 * sequences - 8)
        if length < 0 or pointer < 0:
            raise ValueError(
                f"{idx} is damaged: its last sequence (number {sequences - 1}) has length {length} at byte {pointer}: "
                f"{_REMEDY}"
            )
        expected = pointer + length * itemsize
    actual = bin_.stat().st_size
    if actual != expected:
        raise ValueError(
            f"{bin_} has {actual} bytes, but {idx} describes {expected}: the file is "
            f"{'cut off' if actual < expected else 'longer than its index says, or belongs to another index'}: "
            f"{_REMEDY}"
        )
    return replace(files, tokens=expected // itemsize)


def _number(idx: Path, dtype: str, at: int) -> int:
    """Read one number, `at` bytes after the header. A memory map would read at least a whole page for it."""
    return int(np.fromfile(idx, dtype, 1, offset=HEADER.size + at)[0])


def blocks(size: int, block: int) -> list[tuple[int, int]]:
    """Return (start, stop) of 16 evenly spaced blocks of `block` items each, out of `size` items.

    The first block begins with the first item, and the last block ends with the last item. If 16 blocks would cover all
    items, return a single block of all of them, or none if `size` is 0.
    """
    if size <= _BLOCKS * block:
        return [(0, size)] if size else []
    starts = [i * (size - block) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    return [(start, start + block) for start in starts]


def check_sequences(files: IndexedFiles, first: int, last: int) -> None:
    """Check that each of the sequences [first, last) begins where the one before it ends.

    Raises:
        ValueError: a sequence begins elsewhere, or its length is negative.
    """
    itemsize = np.dtype(files.dtype).itemsize
    all_lengths, all_pointers = files.lengths(), files.pointers()
    for start in range(first, last, _CHUNK_SEQUENCES):
        stop = min(start + _CHUNK_SEQUENCES, last)
        before = max(start - 1, 0)
        lengths = all_lengths[before:stop].astype(np.int64)
        pointers = np.array(all_pointers[before:stop])
        wrong = np.flatnonzero((lengths[1:] < 0) | (pointers[1:] != pointers[:-1] + lengths[:-1] * itemsize)) + 1
        if start == 0 and (lengths[0] < 0 or pointers[0] != 0):
            wrong = np.zeros(1, np.int64)
        if len(wrong):
            n = int(wrong[0])
            fact = f"sequence {before + n} has length {lengths[n]} at byte {pointers[n]}"
            if lengths[n] < 0:
                fact = f"sequence {before + n} has the negative length {lengths[n]}"
            elif before + n == 0:
                fact += ", and the first sequence must begin at byte 0"
            else:
                fact += f", which is not where sequence {before + n - 1} ends"
            raise ValueError(f"{files.idx} is damaged: {fact}: {_REMEDY}")


def check_ids(files: IndexedFiles, vocab_size: int, start: int, ids: np.ndarray) -> None:
    """Check that token ids are in the vocabulary. The first of `ids` is token number `start` of the corpus.

    Raises:
        ValueError: a token id lies outside [0, vocab_size).
    """
    if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return
    position = start + int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    byte = position * np.dtype(files.dtype).itemsize
    # The token is in the last sequence that starts at or before it. This sequence is not empty, because an empty one
    # starts where its successor starts.
    sequence = int(np.searchsorted(files.pointers(), byte, side="right")) - 1
    raise ValueError(
        f"{files.bin}: token id {int(ids[position - start])} at token {position} (sequence {sequence}) "
        f"is outside the vocabulary of {vocab_size}: use the tokenizer that the corpus was prepared "
        "with, or prepare it again; without a tokenizer, raise model.vocab_size"
    )


def validate_sample(files: IndexedFiles, vocab_size: int) -> int:
    """Check where sequences begin, and that token ids are in the vocabulary, in 16 evenly spaced blocks of each file.

    :func:`validate_indexed` checks the whole files.

    Returns:
        The number of tokens that were checked.

    Raises:
        ValueError: a sequence does not follow the one before it, or a token id lies outside the vocabulary.
    """
    for first, last in blocks(files.sequences, 512):
        check_sequences(files, first, last)
    seen = 0
    for first, last in blocks(files.tokens, 2048):
        for start, ids in files.chunks(first, last):
            check_ids(files, vocab_size, start, ids)
            seen += len(ids)
    return seen


def validate_indexed(
    prefix: str | Path,
    vocab_size: int,
    share: tuple[int, int] = (0, 1),
    checksums: tuple[Sequence[str], Sequence[str]] | None = None,
    checked: Callable[[], None] = lambda: None,
) -> IndexedFiles:
    """Check a whole indexed dataset: what `read_index` checks, where each sequence begins, each token id against the
    vocabulary, and the checksums of both files if they are known.

    At most a few million tokens or sequences are read at a time, so that memory does not grow with the files' size.

    Args:
        share: (k, n) to check only share k (from 0) of n shares, as rank k of n ranks does in a distributed run.
        checksums: results of `piece_checksums` for the .bin and for the .idx.
        checked: function that is called after each `_CHUNK_SEQUENCES` sequences, and after each piece
            (`PIECE_BYTES`) of the .bin and, if there are checksums, of the .idx.

    Raises:
        ValueError: the files do not fit each other, a token id lies outside [0, vocab_size), or a file has changed
            since its checksums were taken.
    """
    files = read_index(prefix)
    first, step = share
    for start in range(first * _CHUNK_SEQUENCES, files.sequences, step * _CHUNK_SEQUENCES):
        check_sequences(files, start, min(start + _CHUNK_SEQUENCES, files.sequences))
        checked()
    tokens = PIECE_BYTES // np.dtype(files.dtype).itemsize
    for number in range(first, -(-files.tokens // tokens), step):
        digest = hashlib.sha256()
        for start, ids in files.chunks(number * tokens, (number + 1) * tokens):
            check_ids(files, vocab_size, start, ids)
            digest.update(ids.data)
        if checksums is not None:
            _check_piece(files.bin, number, digest.hexdigest(), checksums[0])
        checked()
    if checksums is not None:
        for number in range(first, len(checksums[1]), step):
            _check_piece(files.idx, number, _piece_checksum(files.idx, number), checksums[1])
            checked()
    return files


def piece_checksums(file: Path) -> list[str]:
    """Return the SHA-256 of each piece of `PIECE_BYTES` bytes of a file. The last piece may be shorter."""
    return [_piece_checksum(file, number) for number in range(-(-file.stat().st_size // PIECE_BYTES))]


def _piece_checksum(file: Path, number: int) -> str:
    digest, left = hashlib.sha256(), PIECE_BYTES
    with open(file, "rb") as stream:
        stream.seek(number * PIECE_BYTES)
        while content := stream.read(min(left, 1 << 22)):
            digest.update(content)
            left -= len(content)
    return digest.hexdigest()


def _check_piece(file: Path, number: int, found: str, checksums: Sequence[str]) -> None:
    expected = checksums[number] if number < len(checksums) else None
    if found != expected:
        raise ValueError(
            f"{file} has changed since launch/prepare_data.py wrote it: the SHA-256 of its piece from byte "
            f"{number * PIECE_BYTES} on is {found[:12]}..., and its stamp says {str(expected)[:12]}...: {_REMEDY}"
        )


def unigram_entropy(prefix: str | Path, vocab_size: int) -> float:
    """Return the entropy of the token distribution, -sum_t p_t ln p_t with p_t = count_t / tokens, in nats per token.

    It is the loss of the best model that ignores context. A language model must reach a lower loss. All token ids must
    be below `vocab_size`.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for _, ids in read_index(prefix).chunks():
        counts += np.bincount(ids, minlength=vocab_size)
    p = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(p * np.log(p)).sum()) + 0.0
