"""Figures of the symmetries of a model's multipliers: mean and spread of the imbalance, by symmetry and layer."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megamult.monitor.names import by_place, layer_of, mean
from megamult.monitor.symmetries import imbalances, norm_columns
from megamult.monitor.weights import Matrix


class Imbalance:
    """Pairs of multipliers of which only the product matters, in a whole model.

    Args:
        matrices: all logical matrices.
        head_dim: rows of one attention head.
        readers: for each norm, (its name in metrics, name of its weight, names of the modules that read its output).
        broken: names of symmetries that the model does not have (:func:`megamult.monitor.symmetries.pairs`).
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        head_dim: int,
        readers: Iterable[tuple[str, str, tuple[str, ...]]],
        broken: Container[str] = (),
    ) -> None:
        self._head_dim, self._broken = head_dim, broken
        # If a layer has several matrices of one role, such as experts, their multipliers form no pairs.
        by_role: dict[tuple[int, str], list[Matrix]] = {}
        for matrix in matrices:
            if matrix.layer is not None:
                by_role.setdefault((matrix.layer, matrix.role), []).append(matrix)
        self._layers: dict[int, dict[str, Matrix]] = {}
        for (layer, role), members in by_role.items():
            if len(members) == 1:
                self._layers.setdefault(layer, {})[role] = members[0]
        self._norms = []
        for subject, norm, modules in readers:
            within = tuple(f"{module}." for module in modules)
            self._norms.append((subject, norm, [matrix for matrix in matrices if matrix.name.startswith(within)]))

    def pairs(self, vectors: Mapping[str, Tensor]) -> list[tuple[str, int | None, Tensor]]:
        """Return (symmetry, layer, imbalance of each pair) for every symmetry in the model.

        A symmetry is absent if one of the two factors of its pairs is absent from the model, for example because K has
        neither row multipliers nor a scalar.

        Args:
            vectors: values of all vectors of the model by name.
        """
        found: list[tuple[str, int | None, Tensor]] = []
        for layer, held in self._layers.items():

            def logs(role: str, side: str, held: dict[str, Matrix] = held) -> Tensor | None:
                matrix = held.get(role)
                return None if matrix is None else matrix.log_factor("row" if side == "row" else "col", vectors)

            of_layer = imbalances(logs, self._head_dim, self._broken)
            found += [(symmetry, layer, values) for symmetry, values in of_layer.items()]
        for subject, norm, readers in self._norms:
            if norm in vectors:
                values = norm_columns(vectors[norm], [matrix.log_factor("col", vectors) for matrix in readers])
                if values is not None:
                    found.append((subject, layer_of(norm), values))
        return found

    def figures(self, vectors: Mapping[str, Tensor]) -> dict[str, float]:
        """Return mean and standard deviation of the imbalance over the pairs of each symmetry, by symmetry and layer.

        Keys begin with `imbalance_mean` and `imbalance_std`.
        """
        pairs = self.pairs(vectors)
        if not pairs:
            return {}
        moments = torch.stack([torch.stack([values.mean(), values.std(correction=0)]) for _, _, values in pairs])
        found: dict[str, float] = {}
        for metric, column in zip(("imbalance_mean", "imbalance_std"), moments.T.tolist(), strict=True):
            each = [(symmetry, layer, value) for (symmetry, layer, _), value in zip(pairs, column, strict=True)]
            found |= by_place(metric, each, mean)
        return found
