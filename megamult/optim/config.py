"""The section `optimizer` of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamult.validation import not_negative, positive, require


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer of the blocks' matrices; everything else is AdamW's."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, embedding and head."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 1.0
    """Threshold of the global gradient l2 norm over everything but the multipliers; 0: no clipping."""
    skip_grad_norm: float = 0.0
    """A step is skipped where the norm that clip_grad_norm looks at is above this, as it is where a gradient is not
    finite; 0: never."""
    momentum: float = 0.95
    """Muon's decay rate of the momentum (Nesterov)."""
    ns_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """Muon's Newton-Schulz polynomials, 5 steps."""
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Muon's Newton-Schulz computes in it. auto: fp32 if train.dtype is fp32, else bf16."""
    exchange_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Muon's momentum and updates travel between ranks in it. auto: fp32 if train.dtype is fp32, else bf16."""
    update_scale: Literal["match_rms_adamw", "spectral"] = "match_rms_adamw"
    """Muon's factor of an update. match_rms_adamw: 0.2 sqrt(max(out, in)), at which AdamW's lr and weight_decay carry
    over; spectral: sqrt(out / in)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Last steps of the run, over which the rate falls to min_lr; constant before."""
    decay: Literal["linear", "cosine", "exponential", "inverse_sqrt"] = "linear"
    """Shape of the fall over decay_steps."""
    min_lr: float = 0.0
    """Learning rate at the end of the fall (exponential and inverse_sqrt: must be positive)."""

    def __post_init__(self) -> None:
        positive("optimizer", lr=self.lr, eps=self.eps)
        not_negative(
            "optimizer",
            weight_decay=self.weight_decay,
            clip_grad_norm=self.clip_grad_norm,
            skip_grad_norm=self.skip_grad_norm,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            min_lr=self.min_lr,
        )
        require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: it must be in [0, 1)")
        for beta in self.betas:
            require(0 <= beta < 1, f"optimizer.betas is {self.betas}: each must be in [0, 1)")
        require(self.min_lr <= self.lr, f"optimizer.min_lr is {self.min_lr}, above optimizer.lr {self.lr}: lower it")
        require(
            self.min_lr > 0 or self.decay_steps == 0 or self.decay not in ("exponential", "inverse_sqrt"),
            f"optimizer.min_lr is {self.min_lr} with optimizer.decay {self.decay}: it never reaches 0; set a "
            "positive min_lr",
        )
