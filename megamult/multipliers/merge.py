"""Merge multipliers into their weights: at inference W_eff = s diag(r) W diag(c) is the weight, at no cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megamult.multipliers.reference import effective_weight

LEAVES = {"row": "row_multiplier", "col": "col_multiplier", "scalar": "scalar_multiplier"}


def merge(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logical tensors without multipliers: each `X.weight` scaled by the `X.*_multiplier` beside it.

    Args:
        tensors: logical tensors by name, as :func:`megamult.zero.gather.gather` yields them.

    Returns:
        The tensors that are no multipliers, under their names; scaled ones in the dtype they came in.

    Raises:
        ValueError: a multiplier without the weight that it scales.
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
                tensor = effective_weight(tensor.float(), **scales).to(tensor.dtype)
            orphans -= set(beside.values())
        merged[name] = tensor
    if orphans:
        raise ValueError(f"no weight stands beside the multiplier {min(orphans)}: pass the weights with it")
    return merged
