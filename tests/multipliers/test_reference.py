"""The four equations agree with autograd in float64; merging gives the effective weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megamult.multipliers.merge import merge
from megamult.multipliers.reference import effective_weight, gradients

SIDES = [chosen for n in range(4) for chosen in itertools.combinations(("row", "col", "scalar"), n)]


def some_multipliers(sides: tuple[str, ...], rows: int, cols: int) -> dict[str, Tensor]:
    """Multipliers on both sides of zero, the second of each vector exactly zero."""
    made = {side: torch.randn({"row": rows, "col": cols, "scalar": 1}[side], dtype=torch.float64) for side in sides}
    for side in set(sides) - {"scalar"}:
        made[side][1] = 0.0
    return made


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_the_four_equations_are_autograds(sides: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    multipliers = {side: m.requires_grad_() for side, m in some_multipliers(sides, 7, 5).items()}
    grad = torch.randn(7, 5, dtype=torch.float64)
    by_hand = gradients(grad, weight.detach(), **{side: m.detach() for side, m in multipliers.items()})
    wanted = torch.autograd.grad(effective_weight(weight, **multipliers), [weight, *multipliers.values()], grad)
    for name, want in zip(["weight", *multipliers], wanted, strict=True):
        # float64 rounds at 1e-16; sums of 35 terms of order one stay 100 times below this.
        torch.testing.assert_close(getattr(by_hand, name).reshape(want.shape), want, rtol=1e-12, atol=1e-13)


def test_the_effective_weight_scales_each_entry_by_its_row_its_column_and_the_scalar() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scaled = effective_weight(weight, torch.tensor([10.0, -1.0]), torch.tensor([1.0, 0.5]), torch.tensor([2.0]))
    assert scaled.tolist() == [[20.0, 20.0], [-6.0, -4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_merging_gives_the_effective_weight_and_nothing_else(sides: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, norm = torch.randn(7, 5).to(dtype), torch.randn(5).to(dtype)
    multipliers = {side: m.to(dtype) for side, m in some_multipliers(sides, 7, 5).items()}
    tensors = {"a.norm.weight": norm, "a.q.weight": weight, "a.bias": norm}
    tensors |= {f"a.q.{side}_multiplier": m for side, m in multipliers.items()}
    merged = merge(tensors)
    assert list(merged) == ["a.norm.weight", "a.q.weight", "a.bias"]
    assert merged["a.norm.weight"] is norm
    want = effective_weight(weight.double(), **{side: m.double() for side, m in multipliers.items()})
    # Three fp32 products, then one rounding to the weight's dtype (half its epsilon).
    rtol = 3 * 2**-24 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(merged["a.q.weight"].double(), want, rtol=rtol, atol=0)
    assert merged["a.q.weight"].dtype == dtype


def test_each_weight_is_merged_with_the_multipliers_beside_it_alone() -> None:
    ones = torch.ones(2, 2)
    tensors = {"a.q.weight": ones, "a.k.weight": ones, "a.k.row_multiplier": torch.tensor([2.0, 3.0])}
    tensors |= {"weight": ones, "row_multiplier": torch.tensor([5.0, 7.0])}
    merged = {name: tensor.tolist() for name, tensor in merge(tensors).items()}
    assert merged == {"a.q.weight": [[1, 1], [1, 1]], "a.k.weight": [[2, 2], [3, 3]], "weight": [[5, 5], [7, 7]]}


@pytest.mark.parametrize("name", ["b.row_multiplier", "b.col_multiplier", "b.scalar_multiplier", "row_multiplier"])
def test_a_multiplier_without_its_weight_cannot_be_merged(name: str) -> None:
    with pytest.raises(ValueError, match=f"the multiplier {name} has no weight in this state_dict"):
        merge({"a.weight": torch.ones(2, 2), name: torch.ones(2)})
