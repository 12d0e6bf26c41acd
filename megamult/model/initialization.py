"""Initial weights that do not depend on the layout: each is drawn whole on the CPU, in fp32, then sliced.

Megatron slices the drawn matrix over tensor-parallel ranks (`use_cpu_initialization`). The draw goes through
`torch.normal`, which `deepspeed.zero.Init` leaves alone; the constructors that it replaces would draw in bf16 on the
GPU and give ZeRO 3 a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def normal(std: float, generator: torch.Generator, rows: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """An init method: N(0, std^2) from `generator` (on the CPU); rows from `rows` on are zero (padding)."""

    def init(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.normal(0.0, std, tuple(tensor.shape), generator=generator, device="cpu", dtype=torch.float32)
        if rows is not None:
            drawn[rows:] = 0.0
        with torch.no_grad():
            return tensor.copy_(drawn)

    return init
