"""Statistics of multipliers: their spread by role and side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Extremes, median and standard deviation of the absolute values of a set of multipliers."""

    minimum: float
    median: float
    maximum: float
    std: float
    count: int


def spread(values: Tensor) -> Spread:
    """Return the spread of the absolute values of multipliers [n].

    Signs are ignored, because flipping the signs of both multipliers of a pair does not change their product.
    """
    magnitudes = values.detach().double().abs().flatten()
    return Spread(
        magnitudes.min().item(),
        magnitudes.median().item(),
        magnitudes.max().item(),
        magnitudes.std(correction=0).item(),
        magnitudes.numel(),
    )


def by_role(multipliers: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Join the values of all (role, side, values) into one vector for each "role/side"."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    for role, side, values in multipliers:
        collected[f"{role}/{side}"].append(values.flatten())
    return {key: torch.cat(vectors) for key, vectors in collected.items()}


def spread_table(values: dict[str, Tensor]) -> str:
    """Format the spread of every role and side as a table."""
    lines = [f"{'multipliers':<22}{'min':>9}{'median':>9}{'max':>9}{'std':>9}{'count':>9}"]
    for key in sorted(values):
        s = spread(values[key])
        lines.append(f"{key:<22}{s.minimum:>9.4f}{s.median:>9.4f}{s.maximum:>9.4f}{s.std:>9.4f}{s.count:>9d}")
    return "\n".join(lines)
