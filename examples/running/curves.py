"""Losses and other figures of a run by step, read from its metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DivergedError(ValueError):
    """A loss of the run is not finite."""


@dataclass(frozen=True)
class Curves:
    """Losses of one run by step, in nats per token."""

    train: dict[int, float]
    valid: dict[int, float]

    @property
    def result(self) -> float:
        """Valid loss after the last step."""
        return self.valid[max(self.valid)]


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl. A figure that is not finite is None.

    Raises:
        OSError: there is no metrics.jsonl.
    """
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_curves(directory: Path) -> Curves:
    """Read the losses of a run from its metrics.jsonl.

    Raises:
        ValueError: there is no evaluation after the last step.
        DivergedError: a loss is not finite.
    """
    records = read_records(directory)
    curves = Curves(
        train={record["step"]: record["loss"] for record in records if "loss" in record},
        valid={record["step"]: record["valid_loss"] for record in records if "valid_loss" in record},
    )
    if not curves.train or max(curves.train) != max(curves.valid, default=None):
        raise ValueError(f"{directory / 'metrics.jsonl'} has no valid loss of its last step: the run is not complete")
    if None in (*curves.train.values(), *curves.valid.values()):
        raise DivergedError(f"{directory / 'metrics.jsonl'} has a loss that is not finite: the run diverged")
    return curves
