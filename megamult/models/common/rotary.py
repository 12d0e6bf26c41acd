"""Frequencies of rotary positions, scaled for long contexts or not. The module uses no torch and does no communication.

The dimensions i and i + dim/2 of a head at position p are turned together by the angle p f_i, where without scaling
f_i = base^(-2i / dim). A scaling is a mapping in Hugging Face's words, such as
``{"rope_type": "linear", "factor": 2.0}``. Only scalings that are a table of frequencies are known here.

Sources: arXiv 2104.09864 (rotary positions), arXiv 2306.15595 (linear scaling), arXiv 2407.21783 (Llama 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Scaling = dict[str, Any]
"""Scaling of rotary positions: `rope_type`, and the numbers that this type needs (:data:`SCALINGS`)."""

SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Names of the numbers that each type of scaling needs."""


def mistakes(key: str, scaling: Any) -> list[str]:
    """Return all mistakes in a scaling, each as fact, value and remedy.

    Args:
        key: name of the setting, for messages.
        scaling: the scaling as the user gave it, or None for none.
    """
    if scaling is None:
        return []
    if not isinstance(scaling, Mapping):
        return [f"{key} is {scaling!r}: give a mapping, such as {{rope_type: linear, factor: 2.0}}, or null"]
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        return [
            f"{key}.rope_type is {kind!r}: use one of {', '.join(SCALINGS)}; other types are more than a table of "
            "frequencies"
        ]
    needed = SCALINGS[kind]
    found = [
        f"{key}.{name} is {scaling.get(name)!r}: give a positive number"
        for name in needed
        if not _positive(scaling.get(name))
    ]
    found += [
        f"{key}.{name} has no effect with rope_type {kind}: leave it out"
        for name in scaling
        if name not in ("rope_type", *needed)
    ]
    if not found and kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        found.append(
            f"{key}.low_freq_factor is {scaling['low_freq_factor']!r}: it must be below high_freq_factor "
            f"({scaling['high_freq_factor']!r})"
        )
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def frequencies(dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> list[float]:
    """Return the dim/2 frequencies f_i, in radians per position, in double precision.

    `linear` divides every frequency by s = `factor`. `llama3` divides by s the frequencies whose wavelength 2 pi / f is
    above w_low = original_max_position_embeddings / low_freq_factor, and keeps those whose wavelength is below
    w_high = original_max_position_embeddings / high_freq_factor. Between the two, it interpolates::

        f' = (1 - t) f / s + t f,  t = (original_max_position_embeddings f / 2 pi - low_freq_factor)
                                       / (high_freq_factor - low_freq_factor)

    Args:
        dim: size of a head, which is even.
        base: base of the frequencies.
        scaling: a scaling without :func:`mistakes`, or None for none.
    """
    plain = [1.0 / base ** (i / dim) for i in range(0, dim, 2)]
    if scaling is None:
        return plain
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return [f / factor for f in plain]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    found = []
    for f in plain:
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)  # in the original context
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append((1 - kept) * f / factor + kept * f)
    return found
