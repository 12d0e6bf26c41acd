"""Memory of an optimizer's state on this rank, in bytes, as it will be after the first step."""

from __future__ import annotations

from megamult.optim.rule import UpdateRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.zero.partition import Partition

_FP32 = 4
"""Bytes of an element of state that belongs to rows or to a share of a whole tensor."""


def state_bytes(optimizer: TwoPhaseOptimizer, partition: Partition) -> int:
    """Return the bytes of the state of all rules and of folded multipliers. Counts of steps are left out.

    Args:
        optimizer: an optimizer that is bound to `partition`. Its state need not exist yet.
        partition: the partition of this rank.
    """
    rules = {id(rule): rule for rule in (optimizer.rule, *optimizer.rules.values())}
    total = sum(_of_rule(rule, optimizer, partition) for rule in rules.values())
    folded = optimizer.folded
    if folded is not None:
        # The multipliers, their gradient and two moments; and W of each matrix that has multipliers.
        total += sum(tensor.numel() * tensor.element_size() for tensor in folded.state_dict().values())
        total += folded.gradient.numel() * folded.gradient.element_size()
        total += folded.latent_bytes
    return total


def _of_rule(rule: UpdateRule, optimizer: TwoPhaseOptimizer, partition: Partition) -> int:
    """Return the bytes of the states that a rule names."""
    elements, rows = (sum(state.per == per for state in rule.states) for per in ("element", "row"))
    pieces = rule.slices(partition, lambda spec: optimizer.rule_of(spec.kind) is rule)
    tensors = {id(piece.tensor): piece.tensor for piece in pieces if not piece.shared}
    per_state = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    per_state += _FP32 * sum(piece.length for piece in pieces if piece.shared)
    return elements * per_state + rows * _FP32 * sum(rule.rows().values())
