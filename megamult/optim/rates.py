"""Factors of learning rate and weight decay for single roles, and their application to slices of parameters.

One parameter can store matrices of several roles, such as Q, K and V, and under ZeRO one tensor of masters can hold
many parameters. Factors therefore do not belong to param groups, but to intervals of elements that have the same
factors (:class:`Run`). Update rules work elementwise and do not know of these intervals. A rule is called once for all
intervals that have the same factors, and gets them as views.
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


class Run(NamedTuple):
    """Elements [start, stop) of a flattened tensor, and their rate."""

    start: int
    stop: int
    rate: Rate


def runs_of_slice(piece: Slice, partition: Partition, rates: Rates) -> list[Run]:
    """Return the runs of a slice; positions count from the slice's first element.

    If all rates are :data:`ONE`, the whole slice is one run. If not, padding is in no run, because it belongs to no
    logical tensor and so has no rate.
    """
    if not rates:
        return [Run(0, piece.length, ONE)]
    runs: list[Run] = []
    for r in rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length):
        _extend(runs, Run(r.offset, r.offset + r.numel, rates.of(piece.spec, piece.spec.parts[r.part])))
    return runs


def runs_of_tensors(partition: Partition, rates: Rates) -> dict[Tensor, list[Run]]:
    """Return {tensor: its runs} for the tensors that the optimizer updates.

    A tensor is left out if all of its elements have the rate :data:`ONE`.
    """
    found: dict[Tensor, list[Run]] = defaultdict(list)
    for piece in sorted(partition.slices, key=lambda piece: piece.offset):
        for run in runs_of_slice(piece, partition, rates):
            _extend(found[piece.tensor], Run(piece.offset + run.start, piece.offset + run.stop, run.rate))
    return {tensor: runs for tensor, runs in found.items() if any(run.rate != ONE for run in runs)}


def learning_rates(of_kind: Mapping[str, float], partition: Partition, rates: Rates) -> dict[str, float]:
    """Return learning rates by kind of parameter, and of each role, or role and side (`q_row`), with its own factors.

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


def _extend(runs: list[Run], run: Run) -> None:
    """Append `run` to `runs`, or lengthen the last run if it has the same rate and ends where `run` starts."""
    if runs and runs[-1].stop == run.start and runs[-1].rate == run.rate:
        runs[-1] = runs[-1]._replace(stop=run.stop)
    else:
        runs.append(run)


def apply_by_rate(
    rule: UpdateRule,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    runs: Mapping[Tensor, Sequence[Run]],
) -> None:
    """Update tensors of one param group with a rule, each element at its own learning rate and weight decay.

    Args:
        rule, group, parameters, gradients, state: see :meth:`megamult.optim.rule.UpdateRule.apply`.
        runs: runs of tensors. A tensor that is not a key has the rate :data:`ONE` in all elements. If a tensor is a
            key, its elements that are in no run do not change.
    """
    whole = [i for i, parameter in enumerate(parameters) if parameter not in runs]
    if whole:
        rule.apply(
            group,
            [parameters[i] for i in whole],
            [gradients[i] for i in whole],
            {key: [values[i] for i in whole] for key, values in state.items()},
        )
    cut = [i for i, parameter in enumerate(parameters) if parameter in runs]
    by_rate: dict[Rate, list[tuple[int, slice]]] = defaultdict(list)
    for i in cut:
        for run in runs[parameters[i]]:
            by_rate[run.rate].append((i, slice(run.start, run.stop)))
    for rate, pieces in by_rate.items():
        if rate.lr == 0:
            continue
        changed = {"lr": group["lr"] * rate.lr, "weight_decay": group["weight_decay"] * rate.weight_decay}
        rule.apply(
            {**group, **changed},
            [parameters[i].detach().view(-1)[at] for i, at in pieces],
            [gradients[i].view(-1)[at] for i, at in pieces],
            {
                # The number of updates belongs to the tensor. A rule would increase it once per run, so each run gets a
                # copy.
                key: [values[i].clone() if key == STEP else values[i].view(-1)[at] for i, at in pieces]
                for key, values in state.items()
            },
        )
    for i in cut:
        if STEP in state:
            state[STEP][i].add_(1)
