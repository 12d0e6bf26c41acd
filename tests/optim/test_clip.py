"""Norms of sharded gradients and clip factors, as pure functions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.multipliers import specs
from megamult.optim.clip import LocalSquares, Norms, clip_factor
from megamult.optim.rates import Rates
from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard
from megamult.parameters.rectangles import counted_intervals
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Slice

MATRIX = megatron.single_matrix("down", 4, 6, dim=1)
NORM = megatron.norm(4, partial=False)
ROW = specs.row_multiplier(MATRIX, [0], partial=False)  # replicated: the columns are sharded
COL = specs.col_multiplier(MATRIX, [0], partial=False)  # sharded


def pieces(*gradients: tuple[ParameterSpec, Tensor]) -> tuple[list[Slice], list[Tensor]]:
    slices = [Slice("x", stated, 0, g.numel(), g, 0, g) for stated, g in gradients]
    return slices, [g for _, g in gradients]


def local_squares(slices: list[Slice], gradients: list[Tensor], tp_rank: int) -> Tensor:
    def counted(piece: Slice) -> list[tuple[int, int]]:
        return counted_intervals(piece.spec, tensor_shard(tp_rank, 2), piece.start, piece.length)

    partition: Any = SimpleNamespace(slices=slices, counted=counted)
    return LocalSquares(partition, torch.device("cpu"), Rates())(gradients)


def test_squares_of_two_tensor_parallel_ranks_add_up_to_those_of_the_full_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    full = {stated: torch.randn(stated.shape, generator=generator) for stated in (MATRIX, NORM, ROW, COL)}
    total = torch.zeros(2, dtype=torch.float64)
    for rank in range(2):
        total += local_squares(
            *pieces(
                (MATRIX, full[MATRIX][:, 3 * rank : 3 * rank + 3].reshape(-1)),
                (NORM, full[NORM]),
                (ROW, full[ROW]),
                (COL, full[COL][3 * rank : 3 * rank + 3]),
            ),
            tp_rank=rank,
        )
    expected = [sum(float(full[x].double().square().sum()) for x in kinds) for kinds in ((MATRIX, NORM), (ROW, COL))]
    assert total.tolist() == pytest.approx(expected, rel=1e-6)  # each norm is taken in fp32


def test_bf16_gradients_are_summed_in_fp32() -> None:
    # The root of 4000/4096 is no bf16 number (8 bits): a norm that was rounded to one would be 1e-4 off.
    gradient = torch.full((4000,), 1 / 64, dtype=torch.bfloat16)
    stated = megatron.norm(4000, partial=False)
    assert local_squares(*pieces((stated, gradient)), tp_rank=0).tolist() == pytest.approx([4000 / 4096, 0.0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stated", [MATRIX, COL])
def test_one_bad_element_makes_its_norm_and_no_other_one_not_finite(stated: ParameterSpec, bad: float) -> None:
    gradients = {MATRIX: torch.ones(12), COL: torch.ones(3)}
    gradients[stated][1] = bad
    main, multipliers = local_squares(*pieces(*gradients.items()), tp_rank=1).sqrt().tolist()
    assert math.isfinite(main) == (stated is COL) and math.isfinite(multipliers) == (stated is MATRIX)
    assert not Norms(main, multipliers).finite


def test_a_rank_that_holds_nothing_adds_nothing() -> None:
    assert local_squares([], [], tp_rank=0).tolist() == [0.0, 0.0]


def test_a_norm_above_the_threshold_is_scaled_to_it_and_one_below_is_left() -> None:
    # torch's formula has 1e-6 beside the norm
    assert 8.0 * clip_factor(8.0, 2.0) == pytest.approx(2.0, rel=1e-6)
    assert clip_factor(1.9, 2.0) == 1.0
    assert clip_factor(0.0, 2.0) == 1.0


def test_threshold_0_never_scales() -> None:
    assert clip_factor(1e9, 0.0) == 1.0
