"""Pieces of long documents, cut where the token ids stay the same, so that memory does not grow with a document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megamult.data.documents import Document
from megamult.data.tokenizer import Tokenizer

PIECE_CHARS = 1 << 18


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        place: place of the document.
        start: number of the document's characters before the piece.
        text: the text.
        last: whether it is the document's last piece.
    """

    place: str
    start: int
    text: str
    last: bool


def cut(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the pieces of all documents. A piece ends at the first place, from `PIECE_CHARS` characters on, where the
    two characters around the cut are not neighbours in any token (see `Tokenizer.neighbours`). A document without such
    a place is one piece, whatever its length."""
    neighbours: frozenset[str] | None = None
    for document in documents:
        text = document.text
        if len(text) > PIECE_CHARS and neighbours is None:
            neighbours = tokenizer.neighbours()
        start = 0
        while neighbours is not None and len(text) - start > PIECE_CHARS:
            places = range(start + PIECE_CHARS, len(text))
            end = next((at for at in places if text[at - 1 : at + 1] not in neighbours), None)
            if end is None:
                break
            yield Piece(document.place, start, text[start:end], last=False)
            start = end
        yield Piece(document.place, start, text[start:], last=True)
