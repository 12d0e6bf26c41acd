"""Statistics of multipliers and the arithmetic of a step, against hand counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megamult.models.llama.config import ModelConfig
from megamult.models.llama.flops import flops_per_token
from megamult.monitor.statistics import by_role, spread, spread_table


def test_spread_is_of_magnitudes() -> None:
    s = spread(torch.tensor([-3.0, 1.0, 2.0, -4.0, 5.0]))
    assert (s.minimum, s.median, s.maximum, s.count) == (1.0, 3.0, 5.0, 5)
    assert s.std == pytest.approx(math.sqrt(2.0), rel=1e-12)  # population: mean of squares around 3, in float64


def test_fresh_multipliers_have_no_spread() -> None:
    s = spread(torch.ones(7))
    assert (s.minimum, s.median, s.maximum, s.std, s.count) == (1.0, 1.0, 1.0, 0.0, 7)


def test_one_multiplier_has_no_spread_either() -> None:
    assert spread(torch.tensor([-2.0])).std == 0.0


def test_bf16_values_are_summed_exactly() -> None:
    # 999 ones and a 3 have a deviation that bf16's own arithmetic (8 bits) would round away.
    values = torch.cat([torch.ones(999), torch.tensor([3.0])]).bfloat16()
    assert spread(values).std == pytest.approx(2 * math.sqrt(0.001 * 0.999), rel=1e-9)


def test_roles_and_sides_are_joined_over_layers_and_kept_apart_from_one_another() -> None:
    joined = by_role(
        [
            ("q", "row", torch.tensor([1.0, 2.0])),
            ("q", "col", torch.tensor([3.0])),
            ("down", "row", torch.tensor([4.0])),
            ("q", "row", torch.tensor([[5.0], [6.0]])),
        ]
    )
    assert {key: value.tolist() for key, value in joined.items()} == {
        "q/row": [1.0, 2.0, 5.0, 6.0],
        "q/col": [3.0],
        "down/row": [4.0],
    }


def test_the_table_has_one_line_per_role_and_side_with_its_figures() -> None:
    lines = spread_table({"v/col": torch.tensor([-0.5, 2.0]), "q/row": torch.ones(3)}).splitlines()
    assert [line.split() for line in lines] == [
        ["multipliers", "min", "median", "max", "std", "count"],
        ["q/row", "1.0000", "1.0000", "1.0000", "0.0000", "3"],
        ["v/col", "0.5000", "0.5000", "2.0000", "0.7500", "2"],  # torch's median is the lower of two
    ]


def test_flops_per_token_are_those_of_a_hand_count() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=12, seq_length=10
    )
    q = out = 8 * 8
    k = v = 4 * 8  # 2 groups of heads of 2
    gate = up = down = 12 * 8
    head = 100 * 8  # the embedding is a look-up
    weights = 2 * (q + k + v + out + gate + up + down) + head
    # Token t attends to t + 1 <= 10 tokens, about 5 on average; q k^T and p v take 2 FLOP x hidden each per token.
    attention_forward = 2 * (2 + 2) * 8 * 5
    # Backward computes two products for each of forward's.
    assert flops_per_token(model, 100) == 3 * (2 * weights + attention_forward)
    # Heads of 6 instead of 2: three times the rows of Q, K and V, and the columns of the output projection.
    larger = replace(model, head_dim=6, qk_norm=True, attention_bias="all", mlp_bias=True)
    weights += 2 * 2 * (q + k + v + out)
    assert flops_per_token(larger, 100) == 3 * (2 * weights + 3 * attention_forward)
