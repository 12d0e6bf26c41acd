"""Texts of the screen: sizes and times as people write them, the summary at the start, and the line of a step.

Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LINES = 15
"""Largest number of lines of the summary at the start."""


def size(number: float) -> str:
    """Return a number of bytes with a decimal unit: "1.91 MB"."""
    power = min(int(math.log10(number)) // 3, 5) if number >= 1 else 0
    value = number / 1000**power
    return f"{value:.0f} B" if power == 0 else f"{value:.3g} {' kMGTP'[power]}B"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    left = round(seconds)
    for unit, length, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= length:
            count, rest = divmod(left, length)
            return f"{count} {unit} {rest // part} {below}"
    return f"{left} s"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of (label, text) as lines, with the texts below one another. An empty label continues a row."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def sources(read: Sequence[tuple[str, int, float]], most: int) -> list[str]:
    """Return one text for each source of a run's data, in at most `most` lines.

    Args:
        read: (name, tokens that the run reads from it, the same in epochs) of each source. Of the sources that have no
            line of their own, only the number, the tokens and the largest number of epochs are told.
        most: number of lines, at least 2.
    """
    shown = read if len(read) <= most else read[: most - 1]
    lines = [f"{name}: {tokens:,} tokens, {epochs:.3g} epochs" for name, tokens, epochs in shown]
    rest = read[len(shown) :]
    if rest:
        tokens, epochs = sum(tokens for _, tokens, _ in rest), max(epochs for *_, epochs in rest)
        lines.append(f"{len(rest)} more sources: {tokens:,} tokens, at most {epochs:.3g} epochs")
    return lines


def step_line(record: Mapping[str, float], steps: int, clock: str, left: float | None, mfu: float | None) -> str:
    """Return the line of a step where the screen is no terminal.

    Args:
        record: the step's record.
        steps: number of steps of the whole run.
        clock: the time of day.
        left: seconds to the end of the run; None if it is not known yet.
        mfu: share of the devices' peak rate that the model's operations take; None if the peak is not known.
    """
    parts = [
        f"{clock} step {int(record['step'])}/{steps}: loss {record['loss']:.4f}",
        f"lr {record['lr']:.3g}",
        f"gradient norm {record['grad_norm']:.3g}",
        speed(record, mfu),
    ]
    if left is not None:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def speed(record: Mapping[str, float], mfu: float | None) -> str:
    """Return the tokens per second of a step and, if it is known, the share of the devices' peak rate."""
    text = f"{record['tokens_per_second']:,.0f} tokens/s"
    return text if mfu is None else f"{text}, MFU {100 * mfu:.1f} %"
