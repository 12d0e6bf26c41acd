"""The stamp that launch/prepare_data.py writes beside a corpus, PREFIX.stamp.json: tokenizer, sizes and digests.

With it a run can check at start-up, without reading the whole corpus, that the files are complete and were encoded with
the run's tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megamult.data.identity import Identity, contents_digest, order_digest
from megamult.data.indexed import PIECE_BYTES, IndexedFiles, piece_checksums
from megamult.data.tokenizer import Tokenizer

SUFFIX = ".stamp.json"
_FORMAT = 2
_READ = (1, _FORMAT)


@dataclass(frozen=True)
class Stamp:
    """Facts about a corpus at the time when it was written.

    Attributes:
        tokenizer_sha256, vocab_size: SHA-256 and vocabulary size of the tokenizer that encoded the corpus.
        dtype, tokens, documents, bin_bytes, idx_bytes: token type, numbers of tokens and documents, and file sizes.
        order, contents: the digests of the corpus's `Identity`.
        piece_bytes, bin_sha256, idx_sha256: size of a piece, and checksums of the consecutive pieces of each file.
        eod: id of the token that ends each document, or None if an older version of megamult wrote the stamp.
        format: number of the stamp's format. It changes when older versions of megamult can no longer read the stamp.
    """

    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    order: str
    contents: str
    piece_bytes: int
    bin_sha256: list[str]
    idx_sha256: list[str]
    eod: int | None = None
    format: int = _FORMAT

    @staticmethod
    def of(files: IndexedFiles, tokenizer: Tokenizer) -> Stamp:
        """Make the stamp of two files that were encoded with `tokenizer`. This reads both files whole."""
        assert tokenizer.sha256 is not None
        return Stamp(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            dtype=files.dtype.__name__,
            tokens=files.tokens,
            documents=files.sequences,
            bin_bytes=files.bin.stat().st_size,
            idx_bytes=files.idx.stat().st_size,
            order=order_digest(files),
            contents=contents_digest(files),
            piece_bytes=PIECE_BYTES,
            bin_sha256=piece_checksums(files.bin),
            idx_sha256=piece_checksums(files.idx),
            eod=tokenizer.eod,
        )

    @staticmethod
    def read(prefix: str) -> Stamp | None:
        """Read the stamp beside PREFIX.bin, or return None if there is none.

        Raises:
            ValueError: the stamp is damaged, or a newer version of megamult wrote it.
        """
        path = Path(prefix + SUFFIX)
        remedy = "rerun launch/prepare_data.py, or remove this file (then only samples of the corpus are checked)"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file ({error}): {remedy}") from None
        if not isinstance(content, dict) or content.get("format") not in _READ:
            found = content.get("format") if isinstance(content, dict) else None
            raise ValueError(
                f"{path} has format {found!r}, but this version of megamult reads formats up to {_FORMAT}: {remedy}"
            )
        try:
            stamp = Stamp(**content)
        except TypeError as error:
            raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
        if stamp.piece_bytes != PIECE_BYTES:
            raise ValueError(f"{path} has piece_bytes {stamp.piece_bytes!r}, not {PIECE_BYTES}: {remedy}")
        return stamp

    def write(self, path: Path) -> None:
        """Write the stamp as JSON, one key per line."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    def check_files(self, files: IndexedFiles) -> Identity:
        """Check that the .bin and the .idx agree with this stamp, and return the `Identity` that the stamp records.

        The check compares the token type, the numbers of tokens and documents, both sizes, and `Identity.contents`.

        Raises:
            ValueError: the stamp was written for other files.
        """
        found = {
            "dtype": files.dtype.__name__,
            "tokens": files.tokens,
            "documents": files.sequences,
            "bin_bytes": files.bin.stat().st_size,
            "idx_bytes": files.idx.stat().st_size,
            "contents": contents_digest(files),
        }
        different = [
            f"{key} {value!r} where the stamp says {getattr(self, key)!r}"
            for key, value in found.items()
            if value != getattr(self, key)
        ]
        if different:
            raise ValueError(
                f"{files.prefix}.bin and .idx are not those that {files.prefix}{SUFFIX} was written for: "
                f"{'; '.join(different)}: copy all three files again, or rerun launch/prepare_data.py"
            )
        return Identity(self.order, self.contents)

    def check_tokenizer(self, prefix: str, tokenizer: Tokenizer) -> None:
        """Check that `tokenizer` is the one with which the corpus was encoded, with the same end-of-document token.

        Raises:
            ValueError: the corpus was encoded with another tokenizer, or its documents end with another token.
        """
        theirs = (
            f"{prefix}{SUFFIX} records one with the SHA-256 {self.tokenizer_sha256[:12]}... and {self.vocab_size} "
            "tokens"
        )
        if tokenizer.sha256 is None:
            raise ValueError(
                f"data.tokenizer is not set, and data source {prefix} was encoded with a tokenizer: {theirs}; set "
                "data.tokenizer to it"
            )
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"data source {prefix} was encoded with another tokenizer than {tokenizer.path}: {theirs}, but the "
                f"given one has the SHA-256 {tokenizer.sha256[:12]}... and {tokenizer.vocab_size} tokens: give the "
                "tokenizer that the corpus was prepared with, or prepare the corpus again with the given one"
            )
        if self.eod not in (None, tokenizer.eod):
            raise ValueError(
                f"the documents of data source {prefix} end with the token {self.eod}, and the end-of-document token "
                f"of {tokenizer.path} is {tokenizer.eod}: set data.eod to {self.eod}"
            )
