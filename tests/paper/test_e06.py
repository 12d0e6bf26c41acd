"""E6 of examples/paper on runs whose ratios and products of multipliers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.paper import e06_product_symmetry as e06
from examples.paper import report
from examples.paper.experiment import NotRun, Results
from examples.paper.grid import Grid
from examples.paper.matrices import log_pairs
from megamult.models.common.hugging_face import Weight
from megamult.monitor.names import layer_of
from tests.paper.settings import losses_of, tiny, write_run

HEADS, GROUPS, DIM = 4, 2, 16  # of tiny()
START = math.log(16)
STEPS = tiny().steps


def results(tmp_path: Path, seeds: tuple[int, ...] = (1,)) -> Results:
    """What E6 reads, of runs in `tmp_path`."""
    return Results(tiny(), Grid(tmp_path), seeds)


def test_a_planted_run_begins_with_the_function_of_a_run_from_ones() -> None:
    arm = e06.planted(tiny(), 1e-3)
    initial = arm.overrides["multipliers.initial"]
    assert arm.overrides["multipliers.divide_weights"] is False
    assert initial["up"]["row"] * initial["down"]["col"] == initial["q"]["row"] * initial["k"]["row"] == 1
    assert initial["up"]["row"] / initial["down"]["col"] == initial["q"]["row"] / initial["k"]["row"] == 16
    assert arm.overrides["multipliers.weight_decay"] * tiny().rates["adamw"][0] == pytest.approx(1e-3)


def test_the_prediction_solves_the_equation(tmp_path: Path) -> None:
    read = results(tmp_path)
    found = e06.predicted(read, 1e-3)
    # d ln sinh(ln R / 2) = -lr wd exactly; the learning rate falls from step 5 on, by a factor of 8 in two steps.
    weights = [1, 1, 1, 1, 8**-0.5, 8**-1]
    for step, value in enumerate(found, 1):
        exact = 2 * math.asinh(math.sinh(START / 2) * math.exp(-1e-3 * sum(weights[:step])))
        # The steps of Euler's method are 2e-3, and their error is of the second order.
        assert value - START == pytest.approx(exact - START, rel=2e-3)
    assert e06.predicted(read, 0.0) == [START] * STEPS


@pytest.mark.parametrize(
    ("part", "spread", "verdict"),
    [(0.9, 0.01, "reproduced"), (0.6, 0.01, "not reproduced"), (0.9, 0.2, "not resolved")],
    ids=["near", "slow", "layers disagree"],
)
def test_a_planted_ratio_must_follow_the_equation(tmp_path: Path, part: float, spread: float, verdict: str) -> None:
    alone, read = results(tmp_path / "alone"), results(tmp_path / "all")
    large, small = (e06.predicted(read, product)[-1] - START for product in (1e-3, 2e-4))

    def train(read: Results, product: float, change: float, of_up_down: float, of_q_k: float, spread: float) -> None:
        """Write a run that ends at START + change x part, with the part by symmetry, and layers on both sides of it."""
        ends = {
            f"imbalance_mean/{symmetry}/layer_{layer:02d}": START + change * (value + sign * spread)
            for symmetry, value in (("up_down", of_up_down), ("q_k", of_q_k))
            for layer, sign in ((0, 1), (1, -1))
        }
        figures = {3: dict.fromkeys(ends, START), STEPS: ends}
        losses_of(read.grid, read.setting, e06.planted(read.setting, product), 1, [5.0] * STEPS, 5.0, figures)

    train(alone, 0.0, small, 1 - part, -0.02, spread)
    still = e06.ratio_moves(alone, 0.0, 0.0)
    assert still.verdict == verdict
    # Of the two symmetries the one that is farther from 0. The error over two layers is half of their distance.
    assert still.estimate is not None and still.estimate.mean == pytest.approx(1 - part)
    assert still.estimate.error == pytest.approx(spread) and "SE over layers" in still.note
    with pytest.raises(NotRun):
        e06.ratio_moves(read, 1e-3, 1.0)
    # Without decay, ln R moves as far as 1e-3 claims, which is no effect of decay.
    train(read, 0.0, large, 1.0, 1.0, 0.0)
    train(read, 1e-3, large, 1 + part, 2.01, spread)
    follows = e06.ratio_moves(read, 1e-3, 1.0)
    assert follows.verdict == verdict
    assert follows.estimate is not None and follows.estimate.mean == pytest.approx(part)
    assert follows.estimate.error == pytest.approx(spread)
    train(read, 8e-6, large, 1 + (1 - part) * small / large, 1.0, spread * small / large)
    unmoved = e06.ratio_moves(read, 8e-6, 0.0)
    assert unmoved.verdict == verdict
    assert unmoved.estimate is not None and unmoved.estimate.mean == pytest.approx(1 - part)


@pytest.mark.parametrize(
    ("gaps", "noise", "verdict"),
    [
        ((0.001, -0.001, 0.0), 0.003, "reproduced"),
        ((0.001, 0.02, 0.0), 0.003, "not reproduced"),
        ((0.001, -0.001, 0.0), 0.1, "not resolved"),
    ],
    ids=["equal", "one is not", "noise"],
)
def test_the_ratio_must_cost_no_loss(tmp_path: Path, gaps: tuple[float, ...], noise: float, verdict: str) -> None:
    read = results(tmp_path)
    for product, gap in zip((0.0, 8e-6, 2e-4, 1e-3), (0.0, *gaps), strict=True):
        swing = noise if product else 0.0
        losses = [5.0 + gap + (swing if (step // 10) % 2 else -swing) for step in range(100)]
        losses_of(read.grid, read.setting, e06.planted(read.setting, product), 1, losses, 5.0)
    measured = e06.loss_stays(read)
    assert measured.verdict == verdict
    if verdict == "not reproduced":
        assert measured.estimate is not None and measured.estimate.mean == pytest.approx(0.02)
        assert "at 0.0002" in measured.note


SIDES = {
    "q": ("q_k", "row", 1),
    "k": ("q_k", "row", -1),
    "v": ("v_out", "row", 1),
    "attention_out": ("v_out", "col", -1),
    "up": ("up_down", "row", 1),
    "down": ("up_down", "col", -1),
}
"""Symmetry, side, and sign of the ratio's part, by role."""


def of_pairs(weight: Weight, common: float, opposite: float) -> dict[str, Tensor]:
    """Multipliers exp(u + w) and exp(u - w) on the two sides of every pair; u is N(0, common^2), w N(0, opposite^2)."""
    layer = layer_of(weight.logical)
    if weight.role not in SIDES:
        return {}
    symmetry, side, sign = SIDES[weight.role]
    generator = torch.Generator().manual_seed(10 * (layer or 0) + len(symmetry))
    size = {"q_k": GROUPS * DIM // 2, "v_out": GROUPS * DIM, "up_down": 96}[symmetry]
    u, w = torch.randn(2, size, generator=generator, dtype=torch.float64)
    logs = common * u + sign * opposite * w
    values = torch.empty(weight.shape[0 if side == "row" else 1], dtype=torch.float64)
    for position in range(len(values)):
        head, feature = position // DIM, position % DIM
        group = head // (HEADS // GROUPS) if weight.role in ("q", "attention_out") else head
        index = {
            "q_k": group * DIM // 2 + feature % (DIM // 2),
            "v_out": group * DIM + feature,
            "up_down": position,
        }[symmetry]
        values[position] = logs[index].exp()
    return {side: values.float()}


@pytest.mark.parametrize(
    ("common", "opposite", "verdict"),
    [(0.4, 0.1, "reproduced"), (0.1, 0.4, "not reproduced")],
)
def test_deviations_of_ratios_are_compared_with_those_of_products(
    tmp_path: Path, common: float, opposite: float, verdict: str
) -> None:
    read = results(tmp_path)
    assert e06.drift_steps(read.setting) == [3, 6, 9, 12]
    arm = e06.drifting(read.setting, "fp32", 0.0)

    def value(weight: Weight, step: int) -> dict[str, Tensor]:
        # Ratios and products drift from 0 on.
        moved = of_pairs(weight, common * step / 12, opposite * step / 12)
        sides = {"row": weight.shape[0], "col": weight.shape[-1]} if len(weight.shape) == 2 else {}
        ones = {side: torch.ones(length) for side, length in sides.items() if weight.role != "head"}
        return {"": torch.ones(weight.shape), **ones, **moved}

    write_run(read.grid, arm, 1, [3, 6, 9, 12], value)
    found = log_pairs(read.checkpoint(arm, 1, 12))
    assert [len(a) for a, _ in found["q_k"]] == [16, 16] and [len(b) for _, b in found["v_out"]] == [32, 32]
    generator = torch.Generator().manual_seed(10 + len("q_k"))
    u, w = torch.randn(2, GROUPS * DIM // 2, generator=generator, dtype=torch.float64)
    a, b = found["q_k"][1]
    torch.testing.assert_close(a, common * u + opposite * w, rtol=0, atol=1e-6)  # the file has fp32
    torch.testing.assert_close(b, common * u - opposite * w, rtol=0, atol=1e-6)
    ratio, product = e06.deviations(read, arm, 1, 12, "q_k")[1]
    assert ratio == pytest.approx(2 * opposite * w.std(correction=0).item() / math.log(10), rel=1e-5)
    assert product == pytest.approx(2 * common * u.std(correction=0).item() / math.log(10), rel=1e-5)
    measured = e06.ratio_spreads_less(read, "fp32")
    assert measured.verdict == verdict
    # At most 30 % from chance, with 16 pairs a layer.
    assert measured.estimate is not None and measured.estimate.mean == pytest.approx(opposite / common, rel=0.3)
    with pytest.raises(NotRun):
        e06.all_deviations(read, "fp32")
    write_run(read.grid, e06.drifting(read.setting, "fp32", 2e-3), 1, [12], value)
    assert "decay 0.002: up_down" in e06.all_deviations(read, "fp32").note


def test_its_figure_is_drawn_of_the_runs_that_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read, file = results(tmp_path), tmp_path / "e6.png"
    assert not report.drawn(e06.plot, read, file)
    ends = {f"imbalance_mean/up_down/layer_{layer:02d}": START for layer in (0, 1)}
    losses_of(read.grid, read.setting, e06.planted(read.setting, 0.0), 1, [5.0] * STEPS, 5.0, {STEPS: ends})
    assert report.drawn(e06.plot, read, file)
