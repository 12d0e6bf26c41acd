"""The section `multipliers` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamult.parameters.roles import resolve
from megamult.validation import not_negative, positive


@dataclass
class MultipliersConfig:
    """Learnable multipliers (arXiv 2601.04890)."""

    implementation: Literal["none", "layer", "folded"] = "layer"
    """layer: the multipliers are parameters of the layers. folded: the optimizer holds the multipliers and the model
    holds effective weights, so that micro-batches cost nothing extra. none: there are no multipliers."""
    placement: str | dict[str, str | list[str]] = "all"
    """Sides that have multipliers: all, symmetry_free, scalar (one multiplier per logical matrix), or a mapping from
    role to row, col, scalar or a list of these."""
    lr: float | None = None
    """Peak learning rate of the multipliers, or null to use optimizer.lr. The schedule is that of optimizer.lr."""
    weight_decay: float = 2e-3
    """Decoupled weight decay of the multipliers."""
    clip: bool = False
    """true: clip the gradients of all multipliers together to the norm optimizer.clip_grad_norm. false: do not clip
    them. In both cases, the norm that clips all other gradients does not include them."""

    def __post_init__(self) -> None:
        resolve(self.placement)
        not_negative("multipliers", weight_decay=self.weight_decay)
        if self.lr is not None:
            positive("multipliers", lr=self.lr)
