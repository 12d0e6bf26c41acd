"""Kinds of lines on the screen: docs/screen.md shows each of them, and a run prints no other."""

from __future__ import annotations

import re

from tests.processes import REPOSITORY

_VARIABLE = (
    # Labels whose text depends on the machine and the folder; of two processes too.
    (r"^(directory|here|versions|data) +.*", r"\1"),
    (r"(warning: optimizer\.weight_decay|warning: multipliers\.weight_decay) .*", r"\1"),
    (r"^learning rate  .*", "learning rate"),
    # Which kinds of memory there are depends on the sharding.
    (r"^memory  +[\d.]+ [kMG]?B per rank: kept [\d.]+ [kMG]?B \(weights .*\); forward and backward .*", "memory"),
    (r"^optimizer  +(?:\w+ \d+ matrices \([\d,]+\)(?:; )?)+.*", "optimizer"),
    (r"^(megamult: )(?:\w+ \d+ matrices \([\d,]+\)(?:; )?)+.*", r"\1ownership"),
    (r"^[\w.]+_multiplier +\[ *\d+\]", "MULTIPLIERS"),
    (r"^\w+/(row|col|scalar) ", "ROLE/SIDE "),
    (r"(\d+ (d|h|min) )?\d+ (h|min|s) left", "TIME left"),
    (r"\S*/\S*checkpoints(/step_\d+)?", "PATH"),
    (r"1 process\b|\d+ processes", "N processes"),
    (r"^(\[[\d -]+:[\d:,]+\]) \[(WARNING|INFO)\] \[(runner|launch)\.py:.*", "LAUNCHER"),
    (r"\b(above|below) it$", "beside it"),
    (r"(?<![A-Za-z_])-?\d+(?:[.,:-]\d+)*(?:e[+-]?\d+)?", "N"),
    (r"\bN [kMG]?B\b", "N B"),
    (r" +", " "),
)


def kind(line: str) -> str:
    """Return a line with numbers, names and what else may differ between two runs replaced."""
    for pattern, instead in _VARIABLE:
        line = re.sub(pattern, instead, line)
    return line.replace(", TIME left", "").strip()


def documented() -> set[str]:
    """Return the kinds of the lines that docs/screen.md shows."""
    page = (REPOSITORY / "docs" / "screen.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", page, re.S)
    return {kind(line) for block in blocks for line in block.splitlines()}


def unknown_lines(screen: str) -> list[str]:
    """Return the lines of a screen that are of no kind that docs/screen.md shows."""
    known = documented()
    return [line for line in screen.splitlines() if line.strip() and kind(line) not in known]
