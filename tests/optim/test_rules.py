"""Rules of one optimizer: settings of their own, states that they may keep; and sums over the axes that specs name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult import param_groups
from megamult.distributed.mesh import ALONE, Mesh
from megamult.optim.adamw import AdamW
from megamult.optim.reduction import PartialGradients
from megamult.optim.rule import State, UpdateRule
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.axes import Axis, Coordinates, Grid
from megamult.parameters.spec import ParameterSpec, Part, Segment
from megamult.parameters.stated import set_spec
from megamult.zero.whole import WholePartition


def stated(role: str, **more: Any) -> torch.nn.Parameter:
    """A parameter of one row of three elements."""
    parameter = torch.nn.Parameter(torch.ones(1, 3))
    set_spec(parameter, ParameterSpec((Part("", role, (1, 3)),), (1, 3), (Segment(0, 0, 0, 1),), **more))
    return parameter


def test_two_rules_with_a_setting_of_one_name_keep_their_own() -> None:
    model = torch.nn.ParameterDict({"matrix": stated("down", orthogonalize=True), "head": stated("head")})
    groups = param_groups(model, lr=0.1, weight_decay=0.0)
    rule, of_matrices = AdamW(betas=(0.5, 0.6)), AdamW(betas=(0.9, 0.99))
    optimizer = TwoPhaseOptimizer(groups, rule, {"matrix": of_matrices}, model=model, mesh=ALONE)
    assert {group["kind"]: group["betas"] for group in optimizer.param_groups} == {
        "matrix": (0.9, 0.99),
        "head": (0.5, 0.6),
    }


def test_a_setting_that_a_group_states_itself_stays() -> None:
    model = torch.nn.ParameterDict({"head": stated("head")})
    groups = [{**group, "betas": (0.1, 0.2)} for group in param_groups(model, lr=0.1, weight_decay=0.0)]
    optimizer = TwoPhaseOptimizer(groups, AdamW(betas=(0.5, 0.6)), model=model, mesh=ALONE)
    assert optimizer.param_groups[0]["betas"] == (0.1, 0.2)


def test_state_of_rows_of_a_rule_that_does_not_prepare_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong has the per-row state second_moment, and prepares = False: .*; set"):

        class Wrong(UpdateRule):
            states = (State("second_moment", "second_moment", per="row"),)


@dataclass(frozen=True, eq=False)
class _Doubling(Mesh):
    """One of two processes along several axes, whose peer has the same values; remembers over what was summed."""

    axes: list[Axis | None] = field(default_factory=list)

    def sum_over(self, tensor: Tensor, axis: Axis | None = None) -> Tensor:
        self.axes.append(axis)
        return tensor.mul_(2)


def test_gradients_are_summed_over_every_axis_that_their_specs_name() -> None:
    roles: dict[str, tuple[Axis, ...]] = {"q": (), "k": ("tensor",), "v": ("expert",), "up": ("tensor", "expert")}
    parameters = {stated(role, reduce_over=axes): role for role, axes in roles.items()}
    for parameter in parameters:
        parameter.grad = torch.ones(1, 3)
    mesh = _Doubling(Coordinates(Grid(tensor=2, expert=2)))
    partition = WholePartition([{"params": list(parameters)}], parameters, mesh)
    gradients = partition.gradients()
    PartialGradients(partition)(gradients)
    assert mesh.axes == ["tensor", "expert"]
    assert [float(g[0]) for g in gradients] == [1.0, 2.0, 2.0, 4.0]
