"""Kinds of weights that a norm can have."""

from __future__ import annotations

from typing import Literal

NormWeight = Literal["vector", "scalar", "frozen"]
"""Weight of a norm. `vector`: one weight for each feature. `scalar`: one for all features. `frozen`: the constant 1."""
