"""Merge multipliers into their weights. Inference then uses W_eff = s diag(r) W diag(c), at no extra cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megamult.multipliers.reference import effective_weight
from megamult.multipliers.specs import LEAVES


def merge(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale each `X.weight` by the multipliers `X.*_multiplier`, and return the tensors without the multipliers.

    Args:
        tensors: logical tensors by name, as :func:`megamult.zero.gather.gather` yields them: weights [out, in],
            `row_multiplier` [out], `col_multiplier` [in], `scalar_multiplier` [1].

    Returns:
        Tensors by name, without multipliers. A scaled weight is computed in fp32 and has the dtype of the given weight.

    Raises:
        ValueError: the weight that a multiplier scales is missing.
    """
    merged: dict[str, Tensor] = {}
    orphans = {name for name in tensors if name.rpartition(".")[2] in LEAVES.values()}
    for name, tensor in tensors.items():
        module, dot, leaf = name.rpartition(".")
        if leaf in LEAVES.values():
            continue
        if leaf == "weight":
            beside = {side: module + dot + other for side, other in LEAVES.items()}
            scales = {side: tensors[key].float() for side, key in beside.items() if key in tensors}
            if scales:
                # An export runs once, on whole matrices, so the plain reference is fast enough. Its result does not
                # depend on a kernel.
                tensor = effective_weight(tensor.float(), **scales).to(tensor.dtype)
            orphans -= set(beside.values())
        merged[name] = tensor
    if orphans:
        raise ValueError(
            f"the multiplier {min(orphans)} has no weight in this state_dict: pass the weights with their multipliers"
        )
    return merged
