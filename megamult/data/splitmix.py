"""A 64-bit hash of integers that is the same in every process, on every machine and in every Python."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def splitmix(*values: int) -> int:
    """Hash integers, in order, to [0, 2^64).

    Each value is folded into the state and mixed by the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014). Python's own `hash` is not used: it leaves small integers
    as they are, so neighbouring seeds would give neighbouring streams.
    """
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
