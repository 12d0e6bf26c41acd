"""The split of a corpus into training and validation documents."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.data.splitmix import splitmix

_SEED = 20240229


@dataclass(frozen=True)
class ValidSplit:
    """Choice of validation documents: the corpus is cut into `valid` equal ranges, and a hash picks a document of each.

    Because of the ranges, the valid set covers the corpus evenly. Because of the hash, a periodic order of documents
    does not bias the choice. The choice depends only on `documents` and `valid`, so it is the same in all processes.
    """

    documents: int
    valid: int

    @classmethod
    def of(cls, documents: int, fraction: float) -> ValidSplit:
        """Return a split with about `fraction` of `documents` in the valid set, and at least one document in each set.

        If `fraction` is 0, the valid set is empty.

        Raises:
            ValueError: `fraction` is outside [0, 1), or there are too few documents to split.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"valid_fraction is {fraction}: give 0 for no valid set, or a number between 0 and 1")
        if fraction == 0:
            return cls(documents, 0)
        if documents < 2:
            raise ValueError(
                f"the corpus has {documents} document(s), but a train and a valid set need at least 2: "
                "separate documents by blank lines, write each as a line of a .jsonl file, or set valid_fraction to 0"
            )
        return cls(documents, min(max(1, round(fraction * documents)), documents - 1))

    def is_valid(self, document: int) -> bool:
        """Tell whether document number `document` (from 0) belongs to the valid set."""
        if self.valid == 0:
            return False
        stratum = ((document + 1) * self.valid - 1) // self.documents
        first = stratum * self.documents // self.valid
        size = (stratum + 1) * self.documents // self.valid - first
        return document == first + splitmix(_SEED, stratum) % size
