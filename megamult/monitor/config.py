"""The section `monitor` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megamult.validation import not_negative, require


@dataclass
class WandbConfig:
    """Weights & Biases, which gets every figure that TensorBoard gets. It needs the extra `wandb`."""

    project: str | None = None
    """Name of the project; null: no figures go there."""
    entity: str | None = None
    """User or team that owns the project; null: the one that is logged in."""
    name: str | None = None
    """Name of the run; null: the name of its run directory."""
    mode: Literal["online", "offline"] = "online"
    """online: figures are sent while the run trains. offline: they are written to wandb/ in the run directory, and
    `wandb sync` sends them later."""

    def __post_init__(self) -> None:
        keys = {"entity": self.entity, "name": self.name, "mode": None if self.mode == "online" else self.mode}
        given = [f"monitor.wandb.{key} is {value}" for key, value in keys.items() if value is not None]
        require(
            self.project is not None or not given,
            f"{', '.join(given)} without monitor.wandb.project, so nothing goes to Weights & Biases: name the project "
            "too, or leave monitor.wandb out",
        )


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
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases as a further output."""

    def __post_init__(self) -> None:
        not_negative("monitor", every=self.every)
