"""Interface of a tokenizer: what preparation of a corpus, training and checkpoints need to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable


class Tokenizer(ABC):
    """Tokenizer of a run's corpora.

    There is deliberately no attribute `pad`: a GPTDataset would replace each token id equal to it by 0, and leave this
    token out of the loss.

    Attributes:
        path: path that the user gave, for messages.
        vocab_size: number of tokens; every id lies in [0, vocab_size).
        eod: id of the end-of-document token.
        sha256: SHA-256 of the files that define the token ids. It identifies the tokenizer wherever the files are. None
            if the tokenizer is unknown.
        defined_by: names of these files, as a checkpoint stores them, joined by ", "; empty if they are unknown.
    """

    path: str
    vocab_size: int
    eod: int
    sha256: str | None
    defined_by: str

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Values that Megatron's dataset configuration hashes to name its caches."""
        return {"class": "megamult.Tokenizer", "sha256": str(self.sha256)}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`. No token that marks its beginning or end is added.

        Raises:
            ValueError: `text` holds a lone surrogate, which is not a Unicode character.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids."""

    def places_to_cut(self) -> Callable[[str, int], bool] | None:
        """Return a function (text, at) -> whether the text can be cut before its character `at`, which is at least 1.

        The pieces of a text that was cut at such places have, one after the other, the same token ids as the whole
        text. None means that no such place is known, so that texts are encoded whole.
        """
        return None

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files for a checkpoint: unchanged contents by path in the checkpoint."""


def not_unicode(text: str) -> ValueError:
    """Return the error for a text with a lone surrogate."""
    return ValueError(f"text {text[:40]!r} is not valid Unicode: remove lone surrogates")
