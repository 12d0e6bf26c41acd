"""Ownership: which update rule trains how many tensors and elements of a model. Pure functions of specs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megamult.optim.packed_multipliers import lay_out
from megamult.optim.rule import UpdateRule
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Cut

if TYPE_CHECKING:
    from megamult.optim.folded import FoldedMultipliers


@dataclass(frozen=True)
class Share:
    """Number of logical tensors, and of their elements without padding."""

    tensors: int = 0
    elements: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.tensors + other.tensors, self.elements + other.elements)

    def said(self, one: str, many: str) -> str:
        """Return "14 matrices (350,208)", given the nouns "matrix" and "matrices"."""
        return f"{self.tensors:,} {one if self.tensors == 1 else many} ({self.elements:,})"


@dataclass(frozen=True)
class Ownership:
    """What each update rule of an optimizer trains, over all ranks."""

    matrices: Mapping[str, Share]
    """Matrices that each rule trains, by the rule's name. Every rule of the optimizer has an entry, AdamW the last."""
    vectors: Share
    """Vectors, such as weights of norms, which AdamW trains."""
    multipliers: Share
    """Vectors of multipliers, in layers or folded, which AdamW trains. Each scalar is a vector of one element."""
    others: Share = Share()
    """Tensors of 3 or more dimensions, such as the weights of convolutions, which AdamW trains."""

    def __str__(self) -> str:
        *first, adamw = [f"{name} {share.said('matrix', 'matrices')}" for name, share in self.matrices.items()]
        parts = [adamw, self.vectors.said("vector", "vectors")]
        if self.others.tensors:
            parts.append(self.others.said("tensor of 3 or more dimensions", "tensors of 3 or more dimensions"))
        if self.multipliers.tensors:
            parts.append(f"{self.multipliers.said('vector', 'vectors')} of multipliers")
        return "; ".join([*first, ", ".join(parts)]) + ", with their elements in parentheses"


def ownership(
    specs: Iterable[ParameterSpec],
    rule: UpdateRule,
    rules: Mapping[str, UpdateRule],
    folding: FoldedMultipliers | None = None,
) -> Ownership:
    """Return what each rule of an optimizer trains.

    Args:
        specs: the specs of all trained parameters.
        rule: the rule of every parameter whose kind is not in `rules`.
        rules: rules by kind of parameter.
        folding: settings of folded multipliers, which are no parameters of the model; None if there are none.
    """
    specs = list(specs)
    matrices = {type(each).__name__: Share() for each in (*rules.values(), rule)}
    vectors = multipliers = others = Share()
    for spec in specs:
        parts = spec.parts[:1] if spec.shared else spec.parts
        share = Share(len(parts), spec.numel_logical)
        if spec.side is not None:
            multipliers += share
        elif len(spec.shape) > 2:  # no rule but AdamW trains them
            others += share
        elif len(spec.shape) == 2:
            matrices[type(rules.get(spec.kind, rule)).__name__] += share
        else:
            vectors += share
    if folding is not None:
        cuts = [Cut(str(number), spec, (), torch.float32) for number, spec in enumerate(specs)]
        laid, _ = lay_out(cuts, folding.placement, folding.shared_columns)
        stored = {(vector.entries.start, vector.entries.stop) for vector in laid}
        multipliers += Share(len(stored), sum(stop - start for start, stop in stored))
    return Ownership(matrices, vectors, multipliers, others)
