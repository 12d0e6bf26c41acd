"""The section `monitor` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megamult.validation import not_negative


@dataclass
class MonitorConfig:
    """Settings of the monitor, which records figures of weights, multipliers, updates and activations.

    docs/monitoring.md lists the figures.
    """

    every: int = 50
    """Steps between records of these figures; 0 turns the records off. A record costs less than half a step, so records
    every 50 steps cost less than 1 % of the run. A run of a few hundred steps still gets enough points for a curve."""
    updates: bool = True
    """Whether to record the RMS of the update. If so, each rank keeps a copy of the fp32 weights that its optimizer
    updates (4 bytes per weight) from the end of the backward pass to the end of the step, in monitored steps only."""

    def __post_init__(self) -> None:
        not_negative("monitor", every=self.every)
