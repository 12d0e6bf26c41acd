"""A 64-bit hash of integers that is the same in every process, on every machine and in every version of Python."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def splitmix(*values: int) -> int:
    """Hash a sequence of integers to [0, 2^64).

    Each value is added to the state, and the finalizer of SplitMix64 mixes the state (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014). Python's own `hash` is not used, because it returns small
    integers unchanged: neighbouring seeds would give neighbouring streams.
    """
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
