"""Passages of long documents, cut where the token ids stay the same, so that memory does not grow with a document."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megamult.data.documents import Document
from megamult.data.tokenizer import Tokenizer

PASSAGE_CHARS = 1 << 18


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        place: where the document is, for messages: its file and line.
        start: number of the document's characters before the passage.
        text: the text.
        last: whether it is the document's last passage.
    """

    place: str
    start: int
    text: str
    last: bool


def cut(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Yield the passages of all documents.

    A passage ends at the first place, from `PASSAGE_CHARS` characters on, where a cut does not change the token ids
    (see `Tokenizer.places_to_cut`). Where a document has no such place, its rest is one passage, whatever its length.
    """
    known = functools.cache(tokenizer.places_to_cut)  # most corpora have no long document, and need no table
    for document in documents:
        text, start = document.text, 0
        while len(text) - start > PASSAGE_CHARS:
            can_cut = known()
            if can_cut is None:
                break
            end = next((at for at in range(start + PASSAGE_CHARS, len(text)) if can_cut(text, at)), None)
            if end is None:
                break
            yield Passage(document.place, start, text[start:end], last=False)
            start = end
        yield Passage(document.place, start, text[start:], last=True)
