"""NorMuon as an update rule: Muon's update, in which each row is divided by the root of the row's second moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megamult.optim.muon.rule import Muon
from megamult.optim.rule import State


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491, algorithm 1): over many steps, all rows (output neurons) get updates of the same size.

    Let O be the orthogonalized momentum of a logical matrix W[out, in], computed as in Muon. One step is::

        v <- beta2 v + (1 - beta2) mean over columns of O * O       [out], stored by the matrix's owner
        U <- O / (sqrt(v) + eps), row by row
        U <- 0.2 sqrt(out in) U / ||U||                             root mean square 0.2, like AdamW's updates
        W <- W - lr (weight_decay W + U)

    v begins at 0 and has no bias correction, as in the paper. The bias of v is the same factor in all rows, and the
    division by ||U|| removes it.

    Args:
        beta2: decay rate of v.
        eps: number added to the square root of v.
        muon: keyword arguments of :class:`Muon`, except `scale`, because the size of NorMuon's update is fixed.

    Raises:
        ValueError: `scale` is given, `beta2` is not in [0, 1), or :class:`Muon` refuses another argument.
    """

    states = (*Muon.states, State("second_moment", "second_moment", per="row"))

    def __init__(self, *, beta2: float = 0.95, eps: float = 1e-8, **muon: Any) -> None:
        if "scale" in muon:
            raise ValueError(f"scale is {muon['scale']!r}: NorMuon fixes the size of its update: remove scale")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is {beta2}: it must be in [0, 1)")
        super().__init__(**muon)
        self.beta2, self.eps = beta2, eps

    def update(self, matrices: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """Orthogonalize the momentum; then normalize each row, and then each matrix."""
        update = self.orthogonalized(matrices).float()
        moment = state["second_moment"].lerp_(update.square().mean(-1), 1 - self.beta2)
        update /= (moment.sqrt() + self.eps).unsqueeze(-1)
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        # With the clamp, a zero matrix gives zeros and not NaN.
        return update.mul_(0.2 * math.sqrt(update[0].numel()) / norm.clamp(min=1e-30))
