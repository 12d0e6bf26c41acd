"""NorMuon as an update rule: Muon's update, with each row normalized by its own second moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megamult.optim.muon.rule import Muon
from megamult.optim.rule import State


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491, algorithm 1): all rows (output neurons) of an update have the same size over time.

    With O the orthogonalized momentum of a logical matrix W[out, in], which Muon computes, one step is::

        v <- beta2 v + (1 - beta2) mean over columns of O * O       [out], kept by the matrix's owner
        U <- O / (sqrt(v) + eps), row by row
        U <- 0.2 sqrt(out in) U / ||U||                             root mean square 0.2, like AdamW's updates
        W <- W - lr (weight_decay W + U)

    v begins at 0 and, as in the paper, has no bias correction: its bias is the same factor in all rows, which the last
    scaling removes.

    Args:
        beta2: decay rate of v.
        eps: number added to the root of v.
        muon: keyword arguments of :class:`Muon` but `scale`, as NorMuon fixes the size of its update.

    Raises:
        ValueError: an unknown setting.
    """

    states = (*Muon.states, State("second_moment", "second_moment", per="row"))

    def __init__(self, *, beta2: float = 0.95, eps: float = 1e-8, **muon: Any) -> None:
        if "scale" in muon:
            raise ValueError(f"scale is {muon['scale']!r}: NorMuon's update has a size of its own; remove it")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is {beta2}: it must be in [0, 1)")
        super().__init__(**muon)
        self.beta2, self.eps = beta2, eps

    def update(self, matrices: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Orthogonalize [batch, rows, cols], and normalize every row, then every matrix."""
        update = self.orthogonalized(matrices).float()
        moment = state["second_moment"].lerp_(update.square().mean(-1), 1 - self.beta2)
        update /= (moment.sqrt() + self.eps).unsqueeze(-1)
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        # The clamp keeps a zero matrix zero.
        return update.mul_(0.2 * math.sqrt(update[0].numel()) / norm.clamp(min=1e-30))
