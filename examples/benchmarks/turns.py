"""Times of functions that run in turn, so that all of them meet the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turn(runs: Mapping[str, Callable[[], Any]], warmup: int, turns: int) -> dict[str, list[float]]:
    """Run functions in turn, and return the seconds of each, turn by turn. The one that goes first rotates.

    With several processes, all of them begin each function together.

    Args:
        runs: functions by name.
        warmup: number of turns before those that are timed.
        turns: number of turns that are timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    for turn in range(warmup + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if together:
                torch.distributed.barrier()
            synchronize()
            began = time.perf_counter()
            runs[name]()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds
