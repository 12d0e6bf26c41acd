"""Folded multipliers against float64: the four equations under every ZeRO class, whole trajectories, odd values."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megamult import TwoPhaseAdamW, param_groups
from megamult.distributed.mesh import ALONE, Mesh
from megamult.multipliers import scaling
from megamult.multipliers.reference import effective_weight
from megamult.optim.folded import LATENT, FoldedMultipliers
from megamult.parameters import megatron
from megamult.parameters.axes import Axis, Coordinates, Grid
from megamult.parameters.initial import Initial
from megamult.parameters.roles import resolve
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Segment
from megamult.parameters.stated import set_spec
from megamult.zero.whole import WholePartition
from tests.optim.folded_workers import PLACEMENT, all_of_it
from tests.optim.workers import StepCase
from tests.processes import run_distributed

CASES = [
    *(StepCase(world=2, zero=stage) for stage in range(4)),
    *(StepCase(world=2, tensor=2, zero=stage) for stage in (0, 1, 3)),
    StepCase(world=2, tensor=2, sequence=True, zero=2),
    StepCase(world=2, zero=1, dtype="bf16"),
    StepCase(world=2, zero=0, dtype="bf16"),
]
STARTING = [*CASES[:4], StepCase(world=2, tensor=2, zero=3), StepCase(world=2, zero=1, dtype="bf16")]


def _name(case: StepCase) -> str:
    return f"tp{case.tensor}{'-sp' if case.sequence else ''}-zero{case.zero}-{case.dtype}"


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(2, all_of_it, CASES, STARTING)


def of_part(multipliers: dict[str, Tensor], weight_name: str) -> dict[str, Tensor]:
    """row, col, scalar of one logical weight."""
    module = weight_name.rpartition(".")[0]
    found = {side: multipliers.get(f"{module}.{side}_multiplier") for side in ("row", "col", "scalar")}
    return {side: values for side, values in found.items() if values is not None}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_chain_rule_is_equation_4_whatever_zero_cuts(ranks: list[dict[str, Any]], case: StepCase) -> None:
    result = ranks[0]["equations"][CASES.index(case)]
    # fp32 sums of up to a few hundred terms; gradients kept in bf16 (ZeRO 0 there) are rounded to 2^-9 once more.
    tolerance = 1e-5 if case.dtype == "fp32" or case.zero else 2**-8
    checked = set()
    for name, g in result["G"].items():
        w, sides = result["W"][name], of_part(result["multipliers"], name)
        lengths = {"row": g.shape[0], "col": g.shape[1], "scalar": 1}
        r, c, s = (sides.get(side, torch.ones(n)).double() for side, n in lengths.items())
        expected = {
            "dW": s * r[:, None] * c * g,
            "row": s * (w * c * g).sum(1),
            "col": s * (r[:, None] * w * g).sum(0),
            "scalar": (r[:, None] * w * c * g).sum().view(1),
        }
        actual = {"dW": result["dW"][name], **of_part(result["dm"], name)}
        assert set(actual) == {"dW", *sides}
        for key, value in actual.items():
            scale = torch.linalg.vector_norm(expected[key])
            if key == "scalar":  # its terms cancel: what rounds is their size, not their sum's
                scale = (r[:, None] * w * c * g).abs().sum()
            assert torch.linalg.vector_norm(value - expected[key]) <= tolerance * scale, (name, key)
            checked.add(key)
    assert checked == {"dW", "row", "col", "scalar"}


def test_matrices_straddle_partitions_and_partitions_hold_several(ranks: list[dict[str, Any]]) -> None:
    """Else the test above would not show what it says."""
    for case, *found in zip(CASES, *(rank["equations"] for rank in ranks), strict=True):
        if case.zero and case.tensor == 1:
            assert any(result["straddling"] for result in found)
            assert any(result["several matrices in a partition"] for result in found)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_every_rank_has_the_same_gradient_of_the_multipliers(ranks: list[dict[str, Any]], case: StepCase) -> None:
    first, second = (rank["equations"][CASES.index(case)]["dm"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", STARTING, ids=_name)
def test_the_model_starts_with_effective_weights(ranks: list[dict[str, Any]], case: StepCase) -> None:
    for rank in ranks:
        losses = rank["starts"][STARTING.index(case)]
        assert losses["cancelled"] == losses["ones"], "2 x 0.5 = 1 exactly"
        # Powers of 2 change no digit, wherever weights are rounded.
        assert losses["doubled"] == pytest.approx(losses["plain, doubled"], rel=1e-6)
        assert abs(losses["doubled"] - losses["ones"]) > 1e-3


ROWS, COLS = 6, 5


class Folded(torch.nn.Module):
    """y = W_eff x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = Parameter(weight.clone())
        set_spec(self.weight, megatron.single_matrix("down", ROWS, COLS, None))


def batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(COLS, 8, generator=generator), torch.randn(ROWS, 8, generator=generator)


Run = tuple[list[float], dict[str, Tensor]]  # losses; final W, r, c, s


def explicit(weight: Tensor, initial: float, sides: str, steps: int, lr: float) -> Run:
    """Losses and final W, r, c, s with autograd through explicit parameters, all in float64."""
    w = Parameter(weight.double())
    multipliers = {
        side: Parameter(torch.full(size, initial, dtype=torch.float64))
        for side, size in (("row", (ROWS,)), ("col", (COLS,)), ("scalar", (1,)))
        if side in sides
    }
    optimizer = torch.optim.AdamW(
        [{"params": [w], "weight_decay": 0.1}, {"params": list(multipliers.values()), "weight_decay": 2e-3}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    losses = []
    for step in range(steps):
        x, y = (part.double() for part in batches(step % 4))
        optimizer.zero_grad()
        loss = (effective_weight(w, **multipliers) @ x - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w], 0.5)
        optimizer.step()
        losses.append(float(loss))
    return losses, {"W": w.detach(), **{side: m.detach() for side, m in multipliers.items()}}


def folded(weight: Tensor, initial: float, sides: str, steps: int, lr: float) -> Run:
    """The same through the optimizer, fp32."""
    model = Folded(weight)
    start = Initial(lambda role, side: initial)
    settings = FoldedMultipliers(resolve({"down": sides.split()}), lr=lr, betas=(0.9, 0.95), eps=1e-6, initial=start)
    optimizer = TwoPhaseAdamW(
        param_groups(model, lr=lr, weight_decay=0.1),
        betas=(0.9, 0.95),
        eps=1e-6,
        clip_grad_norm=0.5,
        model=model,
        folded=settings,
    )
    optimizer.begin()
    losses = []
    for step in range(steps):
        x, y = batches(step % 4)
        optimizer.zero_grad()
        loss = (model.weight @ x - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    multipliers = optimizer.folded
    assert multipliers is not None
    final = {vector.side: multipliers.values[vector.entries].clone() for vector in multipliers.vectors}
    return losses, {"W": optimizer.state[model.weight][LATENT].clone(), **final}


@pytest.mark.parametrize("initial", [1.0, 1e-3, 1e3, -1.0])
@pytest.mark.parametrize("sides", ["row col", "row", "col scalar", "row col scalar"])
def test_any_start_trains_as_explicit_multipliers_in_float64(sides: str, initial: float) -> None:
    # The start is undone in the weights, so that the model's scale is sound: muP-tuned starts come with such weights.
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1)) / initial ** len(sides.split())
    expected_losses, expected = explicit(weight, initial, sides, steps=20, lr=0.01)
    losses, actual = folded(weight, initial, sides, steps=20, lr=0.01)
    # fp32 against float64, some 1e-6 in a gradient; AdamW divides it by the gradient's size, which an eps of 1e-6
    # bounds where the gradients are not tiny.
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all()
        assert torch.linalg.vector_norm(actual[name] - value) <= 2e-3 * torch.linalg.vector_norm(value), name


@pytest.mark.parametrize("sides", ["row col", "row col scalar"])
def test_multipliers_pass_through_zero_and_come_out_negative(sides: str) -> None:
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    start = 0.05  # a few steps of 0.02 away from zero
    expected_losses, _ = explicit(weight, start, sides, steps=40, lr=0.02)
    losses, actual = folded(weight, start, sides, steps=40, lr=0.02)
    assert any(bool((actual[side] < 0).any()) for side in sides.split()), "some must have changed sign"
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert all(torch.isfinite(values).all() for values in actual.values())


def test_multipliers_that_are_exactly_zero_train_on() -> None:
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    losses, actual = folded(weight, 0.0, "row", steps=5, lr=0.1)
    assert all(torch.isfinite(values).all() for values in actual.values())
    assert bool((actual["row"] != 0).all()) and losses[4] != losses[0]


def test_memory_is_four_bytes_per_element_beside_adamws() -> None:
    weight = torch.randn(ROWS, COLS)
    model = Folded(weight)
    settings = FoldedMultipliers(resolve({"down": ["row", "col"]}), lr=0.1)
    optimizer = TwoPhaseAdamW(param_groups(model, lr=0.1, weight_decay=0.0), model=model, folded=settings)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert set(state) == {LATENT, "step", "exp_avg", "exp_avg_sq"}
    assert state[LATENT].numel() * state[LATENT].element_size() == 4 * weight.numel()
    assert optimizer.folded is not None and optimizer.folded.values.numel() == ROWS + COLS


def test_the_placement_of_the_workers_covers_every_combination_of_sides() -> None:
    combinations = {tuple([s] if isinstance(s, str) else s) for s in PLACEMENT.values()}
    assert len(combinations) == 7


@dataclass(frozen=True, eq=False)
class _OneOfTwo(Mesh):
    """One of two tensor-parallel ranks, without the other: a sum has only this rank's terms."""

    def sum_over(self, tensor: Tensor, axis: Axis | None = None) -> Tensor:
        return tensor


@pytest.mark.parametrize("elements", [1 << 20, 10])
def test_a_block_that_two_ranks_hold_copies_of_counts_once_in_the_multipliers_gradients(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projection [x, B] whose B both ranks have, as Mamba-2's with one group: x is cut, B is copied."""
    monkeypatch.setitem(scaling._ELEMENTS, "cpu", elements)  # 10: bands of two rows
    spec = ParameterSpec(
        (Part("x", "q", (8, 5)), Part("b", "k", (3, 5))),
        (11, 5),
        (Segment(0, 0, 0, 8), Segment(8, 1, 0, 3)),
        (Sharding("tensor", 0, (Block(8), Block(3, 1))),),
        orthogonalize=True,
    )
    placement = resolve({"q": ["row", "col"], "k": ["row", "col", "scalar"]})
    generator = torch.Generator().manual_seed(2)
    x, b = (torch.randn(2, rows, 5, generator=generator) for rows in (8, 3))  # W and G of each
    sums: dict[str, Tensor] = {}
    for rank in range(2):
        weight, gradient = (torch.cat([x[i].chunk(2)[rank], b[i]]) for i in range(2))
        parameter = Parameter(weight)
        set_spec(parameter, spec)
        parameter.grad = gradient
        mesh = _OneOfTwo(Coordinates(Grid(tensor=2), tensor=rank))
        partition = WholePartition([{"params": [parameter]}], {parameter: "weight"}, mesh)
        folded = FoldedMultipliers(placement, lr=1.0)
        bound = folded.bind(partition, defaultdict(dict))
        bound.chain_rule(partition.gradients())
        for vector in bound.vectors:
            sums[vector.name] = sums.get(vector.name, 0) + bound.gradient[vector.entries]
    for part, (w, g) in {"x": x, "b": b}.items():
        # All multipliers are 1. Sums of at most 24 fp32 products.
        torch.testing.assert_close(sums[f"{part}.row_multiplier"], (w * g).sum(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sums[f"{part}.col_multiplier"], (w * g).sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums["b.scalar_multiplier"], (b[0] * b[1]).sum()[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_loop_that_loads_both_states_goes_on_where_it_was(order: str) -> None:
    """With initial multipliers, which a fresh optimizer applies to the weights that it finds."""

    def make() -> tuple[torch.nn.Module, TwoPhaseAdamW]:
        model = torch.nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
        set_spec(model.weight, megatron.single_matrix("up", 4, 6, None))
        initial = Initial(lambda role, side: {"row": 2.0, "col": 0.25}[side])
        settings = FoldedMultipliers(resolve("all"), lr=0.01, initial=initial)
        return model, TwoPhaseAdamW(
            param_groups(model, lr=0.01, weight_decay=0.0), folded=settings, mesh=ALONE, model=model
        )

    def step(model: torch.nn.Module, optimizer: TwoPhaseAdamW, seed: int) -> None:
        model.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    model, optimizer = make()
    for seed in (2, 3):
        step(model, optimizer, seed)
    saved = {name: copy.deepcopy(each.state_dict()) for name, each in (("model", model), ("optimizer", optimizer))}
    again = dict(zip(("model", "optimizer"), make(), strict=True))
    for name in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
        again[name].load_state_dict(saved[name])
    assert torch.equal(again["model"].weight, model.weight), "the next forward pass computes with it"
    for each in ((model, optimizer), (again["model"], again["optimizer"])):
        step(*each, 4)
    assert torch.equal(again["model"].weight, model.weight)
