"""Corpora without a tokenizer, such as a .bin and an .idx that Megatron's own tools have written."""

from __future__ import annotations

from collections.abc import Iterable

from megamult.data.tokenizer import Tokenizer


class TokenIds(Tokenizer):
    """Stand-in for the tokenizer of corpora of which only the token ids are known.

    Args:
        vocab_size: number of tokens.
        eod: id of the end-of-document token.

    Raises:
        ValueError: `eod` is no token id.
    """

    def __init__(self, vocab_size: int, eod: int) -> None:
        if not 0 <= eod < vocab_size:
            raise ValueError(
                f"data.eod is {eod} and model.vocab_size is {vocab_size}: the end-of-document token needs an id from 0 "
                f"to {vocab_size - 1}"
            )
        self.path, self.vocab_size, self.eod, self.sha256, self.defined_by = "none", vocab_size, eod, None, ""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Values that Megatron's dataset configuration hashes to name its caches."""
        return {"class": "megamult.TokenIds", "vocab_size": str(self.vocab_size)}

    def encode(self, text: str) -> list[int]:
        """Raise a ValueError, because without a tokenizer no text can be encoded."""
        raise ValueError("there is no tokenizer that could encode a text")

    def decode(self, ids: Iterable[int]) -> str:
        """Raise a ValueError, because without a tokenizer no ids can be decoded."""
        raise ValueError("there is no tokenizer that could decode token ids")

    def files(self) -> dict[str, bytes]:
        """Return no files."""
        return {}
