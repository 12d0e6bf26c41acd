"""Padding of a vocabulary, the same for every tensor-parallel size, as the model must not depend on that size."""

from __future__ import annotations

import math

VOCABULARY_MULTIPLE = 128
"""Number that the padded vocabulary is a multiple of; every tensor-parallel size must divide it."""


def padded_vocab_size(vocab_size: int) -> int:
    """Return the smallest multiple of :data:`VOCABULARY_MULTIPLE` that holds `vocab_size`."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
