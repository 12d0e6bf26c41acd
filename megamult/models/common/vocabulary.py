"""The padding of a vocabulary, the same for every tensor-parallel size: the model must not depend on it."""

from __future__ import annotations

import math

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, which every tensor-parallel size must divide."""


def padded_vocab_size(vocab_size: int) -> int:
    """The smallest multiple of :data:`VOCABULARY_MULTIPLE` that holds `vocab_size`."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
