"""Record of the starts of a run, in a file beside its directory, and whether the run is complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    seconds: float
    exit_code: int


def _beside(directory: Path) -> Path:
    # Not with_suffix: a directory's name may have a dot in it.
    return directory.with_name(directory.name + ".attempts.jsonl")


def attempts(directory: Path) -> list[Attempt]:
    """List the starts of the run in `directory`, in order. A start that was killed with its parent is not recorded."""
    file = _beside(directory)
    if not file.exists():
        return []
    return [Attempt(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def record_attempt(directory: Path, seconds: float, exit_code: int) -> None:
    """Record a start of a run."""
    with _beside(directory).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": round(seconds, 3), "exit_code": exit_code}) + "\n")


def complete(made: Sequence[Attempt]) -> bool:
    """Return whether a run is complete: its last start has ended without an error."""
    return bool(made) and made[-1].exit_code == 0
