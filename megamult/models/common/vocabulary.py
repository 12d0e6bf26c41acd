"""Padding of a vocabulary. It is the same for every tensor-parallel size, as the model must not depend on this size."""

from __future__ import annotations

import math

VOCABULARY_MULTIPLE = 128
"""Divisor of every padded vocabulary size. It must be a multiple of the tensor-parallel size."""


def padded_vocab_size(vocab_size: int) -> int:
    """Return the smallest multiple of :data:`VOCABULARY_MULTIPLE` that is at least `vocab_size`."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
