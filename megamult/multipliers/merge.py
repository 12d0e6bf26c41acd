"""Merge multipliers into their weights: at inference W_eff = s diag(r) W diag(c) is the weight, at no cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megamult.multipliers.reference import effective_weight

SUFFIXES = {"row": ".row_multiplier", "col": ".col_multiplier", "scalar": ".scalar_multiplier"}


def merge(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logical tensors without multipliers: each `X.weight` scaled by the `X.*_multiplier` beside it.

    Args:
        tensors: logical tensors by name, as :func:`megamult.checkpoint.logical.gather` yields them.

    Returns:
        The tensors that are no multipliers, under their names; scaled ones in the dtype they came in.

    Raises:
        ValueError: a multiplier without the weight that it scales.
    """
    merged: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith(tuple(SUFFIXES.values())):
            continue
        module = name.removesuffix(".weight")
        found = {side: module + suffix for side, suffix in SUFFIXES.items() if module + suffix in tensors}
        if found and name != module:
            used.update(found.values())
            scales = {side: tensors[key].float() for side, key in found.items()}
            tensor = effective_weight(tensor.float(), **scales).to(tensor.dtype)
        merged[name] = tensor
    orphans = [n for n in tensors if n.endswith(tuple(SUFFIXES.values())) and n not in used]
    if orphans:
        raise ValueError(f"no weight stands beside the multiplier {orphans[0]}: pass the weights with it")
    return merged
