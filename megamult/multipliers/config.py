"""The section `multipliers` of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamult.parameters.roles import resolve
from megamult.validation import not_negative, positive


@dataclass
class MultipliersConfig:
    """Learnable multipliers (arXiv 2601.04890)."""

    implementation: Literal["none", "layer", "folded"] = "layer"
    """layer: parameters of the layers; folded: kept by the optimizer, while the model holds effective weights and pays
    nothing per micro-batch; none: a plain model."""
    placement: str | dict[str, str | list[str]] = "all"
    """all, symmetry_free, scalar (one per logical matrix), or a mapping from role to row, col, scalar or a list."""
    lr: float | None = None
    """Peak learning rate of the multipliers, with the same schedule as optimizer.lr; null: optimizer.lr."""
    weight_decay: float = 2e-3
    """Decoupled weight decay of the multipliers."""
    clip: bool = False
    """true: clip the multipliers' gradients by a norm of their own, at optimizer.clip_grad_norm; false: do not clip
    them. They never count in the norm of the other gradients."""

    def __post_init__(self) -> None:
        resolve(self.placement)
        not_negative("multipliers", weight_decay=self.weight_decay)
        if self.lr is not None:
            positive("multipliers", lr=self.lr)
