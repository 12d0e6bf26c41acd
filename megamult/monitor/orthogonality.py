"""Error of Muon's orthogonalization, measured on the matrices' owners in a monitored step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.monitor.names import by_place, layer_of, mean
from megamult.optim.muon.rule import Muon
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.zero.partition import Partition


@torch.no_grad()
def orthogonality_error(matrices: Tensor) -> Tensor:
    """Return ||X X^T - I||_F / sqrt(n) of each matrix X, where n is the smaller dimension.

    If X has more rows than columns, X^T X replaces X X^T. The result is the root mean square of s^2 - 1 over the
    singular values s of X: 0 if X is orthogonal, and 1 if X is 0.

    Args:
        matrices: [batch, rows, cols] in any floating dtype; the products are computed in fp32.
    """
    x = matrices.float()
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.vector_norm(gram, dim=(-2, -1)) / math.sqrt(x.shape[-2])


class Orthogonality:
    """Measurement of how far the result of Newton-Schulz for each matrix of Muon or NorMuon is from orthogonal.

    All ranks must call each method together.
    """

    def __init__(self, partition: Partition, optimizer: TwoPhaseOptimizer) -> None:
        rule = optimizer.rules.get("matrix")
        self._rule = rule if isinstance(rule, Muon) else None
        self._mesh = partition.mesh
        self._role = {
            cut.spec.logical_name(cut.name, part): part.role for cut in partition.cuts for part in cut.spec.parts
        }
        self._errors: dict[str, Tensor] = {}

    def arm(self) -> None:
        """Start to measure what Newton-Schulz returns, from the next step until :meth:`figures` is called."""
        self._errors = {}
        if self._rule is not None:
            self._rule.watch = self._measure

    def _measure(self, names: list[str], matrices: Tensor) -> None:
        self._errors |= dict(zip(names, orthogonality_error(matrices), strict=True))

    def figures(self) -> dict[str, float]:
        """Return the mean error by role and layer, and stop measuring. Collective over all ranks."""
        if self._rule is None or self._rule.matrices is None:
            return {}
        self._rule.watch = None
        names = self._rule.matrices.names
        nothing = torch.zeros((), device=device.local_device())
        # Each matrix has one owner, and all other ranks add zero. In a skipped step, nothing was measured.
        errors = torch.stack([self._errors.get(name, nothing) for name in names])
        measured = torch.tensor([float(len(self._errors))], device=errors.device)
        packed = self._mesh.sum_over(torch.cat([errors, measured])).tolist()
        if packed.pop() < len(names):
            return {}
        each = [(self._role[name], layer_of(name), error) for name, error in zip(names, packed, strict=True)]
        return by_place("orthogonality_error", each, mean)
