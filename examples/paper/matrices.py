"""Matrices of a checkpoint with their roles and multipliers, spreads of their rows and columns, and pairs of
multipliers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor

from examples.paper.paired import coefficient_of_variation
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.models.architectures import architecture_of, model_section
from megamult.monitor.names import layer_of
from megamult.monitor.symmetries import Pairs, pairs
from megamult.multipliers.reference import effective_weight
from megamult.multipliers.specs import LEAVES
from megamult.parameters.spec import Side

BLOCK_ROLES = ("q", "k", "v", "attention_out", "gate", "up", "down")
"""Roles of the matrices of a Llama's blocks."""


@dataclass(frozen=True)
class Matrix:
    """One logical matrix of one layer."""

    role: str
    layer: int | None
    """Index of its layer, or None if it is in no layer."""
    latent: Tensor
    """W[out, in], which the optimizer decays."""
    multipliers: dict[Side, Tensor]
    """r[out], c[in] or s[1], by side."""

    @property
    def effective(self) -> Tensor:
        """W_eff = s diag(r) W diag(c), with which the model computes."""
        return effective_weight(self.latent, **cast(dict[str, Tensor], self.multipliers))


def matrices(saved: SavedCheckpoint) -> Iterator[Matrix]:
    """Yield the matrices of a checkpoint in fp32: embedding, blocks, head."""
    model = model_section(saved.info.config)
    for weight in architecture_of(model).weights(model, saved.info.vocab_size):
        if len(weight.shape) != 2 or f"model.{weight.logical}" not in saved.shapes:  # a norm, or a tied head
            continue
        names = {side: f"model.{weight.multiplier(side)[0]}" for side in LEAVES}
        yield Matrix(
            weight.role,
            layer_of(weight.logical),
            saved.read(f"model.{weight.logical}").float(),
            {side: saved.read(name).float() for side, name in names.items() if name in saved.shapes},
        )


def root_mean_squares(saved: SavedCheckpoint) -> dict[str, float]:
    """Return the RMS of W by role, and that of the multipliers by "role/side", each over all layers."""
    squares: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for matrix in matrices(saved):
        tensors = {matrix.role: matrix.latent}
        tensors |= {f"{matrix.role}/{side}": values for side, values in matrix.multipliers.items()}
        for key, values in tensors.items():
            squares[key] += float(values.double().square().sum())
            counts[key] += values.numel()
    return {key: math.sqrt(squares[key] / counts[key]) for key in squares}


def log_pairs(saved: SavedCheckpoint) -> dict[str, list[Pairs]]:
    """Return ln|a| and ln|b| of all pairs of multipliers of which only the product matters, by symmetry and layer."""
    model = model_section(saved.info.config)
    held: dict[int, dict[str, Matrix]] = defaultdict(dict)
    for matrix in matrices(saved):
        if matrix.layer is not None:
            held[matrix.layer][matrix.role] = matrix
    found: dict[str, list[Pairs]] = defaultdict(list)
    for layer in sorted(held):

        def logs(role: str, side: str, layer: int = layer) -> Tensor | None:
            values = held[layer][role].multipliers.get(cast(Side, side))
            return None if values is None else values.double().abs().log()

        for symmetry, each in pairs(logs, model.head_size, model.broken_symmetries).items():
            found[symmetry].append(each)
    return dict(found)


def relative_norms(weight: Tensor, dim: int) -> np.ndarray:
    """Return the RMS of each row (dim 1) or column (dim 0) of a matrix, divided by their mean."""
    norms = weight.double().square().mean(dim).sqrt()
    return (norms / norms.mean()).numpy()


def pooled_norms(saved: SavedCheckpoint) -> dict[str, dict[str, np.ndarray]]:
    """Return relative norms of each role, joined over the layers.

    Returns:
        {"rows of W_eff", "columns of W_eff", "rows of W"}: {role: norms}.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for matrix in matrices(saved):
        found["rows of W_eff"][matrix.role].append(relative_norms(matrix.effective, 1))
        found["columns of W_eff"][matrix.role].append(relative_norms(matrix.effective, 0))
        found["rows of W"][matrix.role].append(relative_norms(matrix.latent, 1))
    return {kind: {role: np.concatenate(each) for role, each in roles.items()} for kind, roles in found.items()}


def variations(norms: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the coefficient of variation of each role's norms."""
    return {role: coefficient_of_variation(values) for role, values in norms.items()}


def decades(norms: np.ndarray) -> float:
    """Return the width between the 5th and the 95th percentile, as a base-10 logarithm of their ratio."""
    low, high = np.percentile(norms, (5, 95))
    return float(np.log10(high / low))
