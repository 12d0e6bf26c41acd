"""A symmetry moves the imbalance by the logarithm of its factor, and the model's function does not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamult.models.llama.config import ModelConfig
from megamult.monitor.symmetries import imbalances, norm_columns, redundant_pairs
from megamult.parameters.roles import resolve

HEADS, GROUPS, DIM, HIDDEN, SEQ = 4, 2, 6, 10, 5


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on [seq, heads, dim], as Megatron turns them: element i with element i + dim / 2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[0])[:, None] * 10.0 ** -torch.arange(half)
    cos, sin = torch.cat([angles.cos()] * 2, 1)[:, None].double(), torch.cat([angles.sin()] * 2, 1)[:, None].double()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention(
    x: Tensor, w: dict[str, Tensor], m: dict[str, Tensor], bias: float = 0.0, qk_norm: bool = False
) -> Tensor:
    """Grouped-query attention with row multipliers of Q, K, V and column multipliers of the output projection."""
    q, k, v = ((x @ (m[name][:, None] * w[name]).T + bias).view(SEQ, -1, DIM) for name in "qkv")
    if qk_norm:
        q, k = (torch.nn.functional.rms_norm(each, (DIM,)) for each in (q, k))
    q, k = rotated(q), rotated(k)
    k, v = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
    return torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ (w["out"] * m["out"]).T


def made() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {"q": HEADS * DIM, "k": GROUPS * DIM, "v": GROUPS * DIM}
    weights = {name: draw(count, HIDDEN) for name, count in rows.items()} | {"out": draw(HIDDEN, HEADS * DIM)}
    multipliers = {name: draw(count).exp() for name, count in {**rows, "out": HEADS * DIM}.items()}
    return draw(SEQ, HIDDEN), weights, multipliers


def found(m: dict[str, Tensor]) -> dict[str, Tensor]:
    sides = {("q", "row"): "q", ("k", "row"): "k", ("v", "row"): "v", ("attention_out", "col"): "out"}
    return imbalances(lambda role, side: m[sides[role, side]].log() if (role, side) in sides else None, DIM)


def test_one_rotary_pair_of_a_group_is_one_pair_of_the_symmetry_of_queries_and_keys() -> None:
    x, weights, before = made()
    group, pair, t = 1, 2, 3.0
    key_rows = [group * DIM + pair, group * DIM + pair + DIM // 2]
    heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
    query_rows = [head * DIM + pair + half for head in heads for half in (0, DIM // 2)]
    after = {name: value.clone() for name, value in before.items()}
    after["q"][query_rows] *= t
    after["k"][key_rows] /= t
    torch.testing.assert_close(attention(x, weights, after), attention(x, weights, before))
    moved = (found(after)["q_k"] - found(before)["q_k"]).view(GROUPS, DIM // 2)
    expected = torch.zeros_like(moved)
    expected[group, pair] = 2 * math.log(t)
    torch.testing.assert_close(moved, expected)
    assert torch.equal(found(after)["v_out"], found(before)["v_out"])
    # With a bias of Q and K, or with QK-norm, it is none.
    for bias, qk_norm in ((0.5, False), (0.0, True)):
        both = (attention(x, weights, m, bias, qk_norm) for m in (after, before))
        assert not torch.allclose(*both)
    # Half of a rotary pair is no symmetry: the output changes.
    broken = {name: value.clone() for name, value in before.items()}
    broken["q"][[row for row in query_rows if row % DIM == pair]] *= t
    broken["k"][key_rows[0]] /= t
    assert not torch.allclose(attention(x, weights, broken), attention(x, weights, before))


def test_a_value_row_of_a_group_meets_the_same_column_of_all_its_heads() -> None:
    x, weights, before = made()
    group, row, t = 0, 4, 0.5
    after = {name: value.clone() for name, value in before.items()}
    after["v"][group * DIM + row] *= t
    for head in range(HEADS // GROUPS):
        after["out"][head * DIM + row] /= t
    torch.testing.assert_close(attention(x, weights, after), attention(x, weights, before))
    with_bias = attention(x, weights, after, bias=0.5), attention(x, weights, before, bias=0.5)
    assert not torch.allclose(*with_bias), "a bias of V is not scaled"
    moved = found(after)["v_out"] - found(before)["v_out"]
    expected = torch.zeros_like(moved)
    expected[group * DIM + row] = 2 * math.log(t)
    torch.testing.assert_close(moved, expected)


def test_up_and_down_meet_feature_by_feature_and_a_missing_side_is_no_pair() -> None:
    up, down = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0])
    held = {("up", "row"): up, ("down", "col"): down, ("q", "row"): up}
    assert torch.equal(imbalances(lambda role, side: held.get((role, side)), DIM)["up_down"], up - down)
    assert imbalances(lambda role, side: held.get((role, side)), DIM).keys() == {"up_down"}


def test_a_norm_is_redundant_only_against_the_columns_of_all_its_readers() -> None:
    norm, q, k = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()
    values = norm_columns(norm, [q, k])
    assert values is not None
    torch.testing.assert_close(values, torch.tensor([math.log(2.0) - 0.5, -0.5]).double())
    assert norm_columns(norm, [q, None]) is None and norm_columns(norm, []) is None


def test_placements_leave_these_pairs() -> None:
    assert len(redundant_pairs(resolve("all"))) == len(redundant_pairs(resolve("scalar"))) == 3
    assert redundant_pairs(resolve("symmetry_free")) == []
    assert redundant_pairs(resolve({"up": "row", "down": "scalar", "q": "row"})) == ["rows of up and columns of down"]


def test_symmetries_that_a_model_does_not_have_are_left_out() -> None:
    """With a bias or QK-norm a pair's product is not all that matters: the figures would speak of nothing."""
    broken = ModelConfig(qk_norm=True, mlp_bias=True).broken_symmetries
    assert broken == {"q_k", "up_down"}
    assert ModelConfig(attention_bias="qkv").broken_symmetries == {"q_k", "v_out"}
    assert ModelConfig(head_dim=12).broken_symmetries == set()
    assert redundant_pairs(resolve("all"), broken) == ["rows of v and columns of attention_out"]
    ones = torch.zeros(8)
    assert imbalances(lambda role, side: ones, 4, broken).keys() == {"v_out"}
