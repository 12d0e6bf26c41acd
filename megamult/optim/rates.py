"""Factors of learning rate and weight decay for single roles, and their application to slices of parameters.

One parameter can store matrices of several roles, such as Q, K and V, and under ZeRO one tensor of masters can hold
many parameters. Factors therefore do not belong to param groups, but to intervals of elements that have the same
factors (:class:`Stretch`). The method `apply` of an update rule works elementwise and does not know of these
intervals: it is called once for all intervals that have the same factors, and gets them as views.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from megamult.optim.rule import UpdateRule
from megamult.optim.state import STEP
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec, Part, Role, Side
from megamult.zero.partition import Partition, Slice


class Rate(NamedTuple):
    """Factors of one logical tensor. They multiply the learning rate and the weight decay of its param group.

    If `lr` is 0, the tensor stays constant, and no gradient norm includes its gradient.
    """

    lr: float = 1.0
    weight_decay: float = 1.0


ONE = Rate()
"""Rate of a tensor that has the learning rate and weight decay of its param group."""


@dataclass(frozen=True)
class Rates:
    """Rates of weights by role, and of multipliers by role and side. A rate that is absent is :data:`ONE`."""

    weights: Mapping[Role, Rate] = field(default_factory=dict)
    multipliers: Mapping[tuple[Role, Side], Rate] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Return whether any rate is other than :data:`ONE`."""
        return any(rate != ONE for rate in (*self.weights.values(), *self.multipliers.values()))

    def of(self, spec: ParameterSpec, part: Part) -> Rate:
        """Return the rate of a part of a parameter."""
        if spec.side is None:
            return self.weights.get(part.role, ONE)
        return self.multipliers.get((part.role, spec.side), ONE)


class Stretch(NamedTuple):
    """Elements [start, stop) of a flattened tensor, and their rate."""

    start: int
    stop: int
    rate: Rate


def stretches_of_slice(piece: Slice, partition: Partition, rates: Rates) -> list[Stretch]:
    """Divide a slice into stretches. Positions count from the slice's first element.

    If all rates are :data:`ONE`, the whole slice is one stretch. If not, padding is in no stretch, because it belongs
    to no logical tensor and so has no rate.
    """
    if not rates:
        return [Stretch(0, piece.length, ONE)]
    stretches: list[Stretch] = []
    for r in rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length):
        _extend(stretches, Stretch(r.offset, r.offset + r.numel, rates.of(piece.spec, piece.spec.parts[r.part])))
    return stretches


def stretches_of_tensors(partition: Partition, rates: Rates) -> dict[Tensor, list[Stretch]]:
    """Return {tensor: its stretches} for the tensors that the optimizer updates.

    A tensor is left out if all of its elements have the rate :data:`ONE`.
    """
    found: dict[Tensor, list[Stretch]] = defaultdict(list)
    for piece in sorted(partition.slices, key=lambda piece: piece.offset):
        for stretch in stretches_of_slice(piece, partition, rates):
            _extend(
                found[piece.tensor], Stretch(piece.offset + stretch.start, piece.offset + stretch.stop, stretch.rate)
            )
    return {
        tensor: stretches for tensor, stretches in found.items() if any(stretch.rate != ONE for stretch in stretches)
    }


def learning_rates(of_kind: Mapping[str, float], partition: Partition, rates: Rates) -> dict[str, float]:
    """Return {name: learning rate} of each kind of parameter, and of each role (`q`) or side of a role (`q_row`) that
    has its own factor of the learning rate or weight decay.

    Args:
        of_kind: learning rate of each kind of parameter.
        partition: partition of the model's parameters.
        rates: factors of single roles.
    """
    found = dict(of_kind)
    for cut in partition.cuts:
        for part in cut.spec.parts if cut.spec.side is None else ():
            if part.role in rates.weights:
                found[part.role] = of_kind[cut.spec.kind] * rates.weights[part.role].lr
    for (role, side), rate in rates.multipliers.items():
        found[f"{role}_{side}"] = of_kind["multiplier"] * rate.lr
    return found


def _extend(stretches: list[Stretch], stretch: Stretch) -> None:
    """Append a stretch, or lengthen the last one if it has the same rate and ends where `stretch` starts."""
    if stretches and stretches[-1].stop == stretch.start and stretches[-1].rate == stretch.rate:
        stretches[-1] = stretches[-1]._replace(stop=stretch.stop)
    else:
        stretches.append(stretch)


def apply_by_rate(
    rule: UpdateRule,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    stretches: Mapping[Tensor, Sequence[Stretch]],
) -> None:
    """Update tensors of one param group with a rule, each element at its own learning rate and weight decay.

    Args:
        rule, group, parameters, gradients, state: see :meth:`megamult.optim.rule.UpdateRule.apply`.
        stretches: stretches of tensors. A tensor that is not a key has the rate :data:`ONE` in all elements. If a
            tensor is a key, its elements that are in no stretch do not change.
    """
    whole = [i for i, parameter in enumerate(parameters) if parameter not in stretches]
    if whole:
        rule.apply(
            group,
            [parameters[i] for i in whole],
            [gradients[i] for i in whole],
            {key: [values[i] for i in whole] for key, values in state.items()},
        )
    cut = [i for i, parameter in enumerate(parameters) if parameter in stretches]
    by_rate: dict[Rate, list[tuple[int, slice]]] = defaultdict(list)
    for i in cut:
        for stretch in stretches[parameters[i]]:
            by_rate[stretch.rate].append((i, slice(stretch.start, stretch.stop)))
    for rate, pieces in by_rate.items():
        if rate.lr == 0:
            continue
        changed = {"lr": group["lr"] * rate.lr, "weight_decay": group["weight_decay"] * rate.weight_decay}
        rule.apply(
            {**group, **changed},
            [parameters[i].detach().view(-1)[at] for i, at in pieces],
            [gradients[i].view(-1)[at] for i, at in pieces],
            {
                # The number of updates belongs to the tensor. A rule would increase it once per stretch, so each
                # stretch gets a copy.
                key: [values[i].clone() if key == STEP else values[i].view(-1)[at] for i, at in pieces]
                for key, values in state.items()
            },
        )
    for i in cut:
        if STEP in state:
            state[STEP][i].add_(1)
