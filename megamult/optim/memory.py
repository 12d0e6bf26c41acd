"""Memory of an optimizer's state on this rank, in bytes, as it will be after the first step."""

from __future__ import annotations

from collections import Counter

from megamult.optim.adamw import AdamW
from megamult.optim.packed_multipliers import lay_out
from megamult.optim.rule import UpdateRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.zero.partition import Partition

_FP32 = 4
"""Bytes of an element of state that belongs to rows or to a share of a whole tensor, and of a folded multiplier."""

FOLDED = "folded multipliers and weights"
"""Name of what folded multipliers add to the state."""


def state_bytes(optimizer: TwoPhaseOptimizer, partition: Partition) -> int:
    """Return the bytes of the state of all rules and of folded multipliers. Counts of steps are left out.

    Args:
        optimizer: an optimizer whose rules are bound to `partition`. Its state need not exist yet.
        partition: the partition of this rank.
    """
    return sum(state_by_name(optimizer, partition).values())


def state_by_name(optimizer: TwoPhaseOptimizer, partition: Partition) -> dict[str, int]:
    """Return the bytes of each state by its name in checkpoints, and of what folded multipliers add (:data:`FOLDED`).

    The arguments are those of :func:`state_bytes`.
    """
    found: Counter[str] = Counter()
    for rule in {id(rule): rule for rule in (optimizer.rule, *optimizer.rules.values())}.values():
        found.update(_of_rule(rule, optimizer, partition))
    folding = optimizer.folding
    if folding is not None:
        vectors, _ = lay_out(partition.cuts, folding.placement, folding.shared_columns)
        entries = max((vector.entries.stop for vector in vectors), default=0)
        # The multipliers, their gradient and AdamW's moments; and W of each tensor that has multipliers.
        latent = {id(piece.tensor): piece.tensor for piece in partition.slices if folding.covers(piece.spec)}
        found[FOLDED] = _FP32 * entries * (2 + len(AdamW.states))
        found[FOLDED] += sum(tensor.numel() * tensor.element_size() for tensor in latent.values())
    return dict(found)


def _of_rule(rule: UpdateRule, optimizer: TwoPhaseOptimizer, partition: Partition) -> dict[str, int]:
    """Return the bytes of the states that a rule names."""
    pieces = rule.slices(partition, lambda spec: optimizer.rule_of(spec.kind) is rule)
    tensors = {id(piece.tensor): piece.tensor for piece in pieces if not piece.shared}
    per_element = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    per_element += _FP32 * sum(piece.length for piece in pieces if piece.shared)
    per_row = _FP32 * sum(rule.rows().values())
    return {state.name: per_row if state.per == "row" else per_element for state in rule.states}
