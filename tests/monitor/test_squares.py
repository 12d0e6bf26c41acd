"""RMS and spread from sums of squares of blocks, against W_eff computed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megamult.monitor.names import by_place, key, layer_of, mean
from megamult.monitor.squares import rms, squares_of, totals, variation

ROWS, COLS = 37, 23
# Sums of at most 37 x 23 positive fp32 terms, each correct to 2^-24.
RELATIVE = 1e-6


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(ROWS, COLS, generator=generator) * torch.linspace(0.1, 3, COLS)
    return weight, torch.rand(ROWS, generator=generator) + 0.5, torch.rand(COLS, generator=generator) - 1.5


@pytest.mark.parametrize("with_rho", [False, True])
@pytest.mark.parametrize("with_kappa", [False, True])
def test_sums_of_blocks_give_the_norms_of_the_whole_effective_matrix(with_rho: bool, with_kappa: bool) -> None:
    weight, rho, kappa = drawn()
    sums = [torch.zeros(ROWS), torch.zeros(COLS), torch.zeros(ROWS), torch.zeros(COLS)]
    # Blocks as ZeRO leaves them: a part of a row, whole rows, the rest.
    for rows, cols in (((0, 5), (0, COLS)), ((5, 6), (0, 9)), ((5, 6), (9, COLS)), ((6, ROWS), (0, COLS))):
        r, c = slice(*rows), slice(*cols)
        found = squares_of(weight[r, c], rho[r] if with_rho else None, kappa[c] if with_kappa else None)
        for total, at, added in zip(sums, (r, c, r, c), found, strict=True):
            if added is not None:
                total[at] += added
    expected = weight.double()
    for k, matrix in enumerate(
        (expected, expected * (rho[:, None] if with_rho else 1.0) * (kappa if with_kappa else 1.0))
    ):
        if k == 1 and not (with_rho or with_kappa):
            assert not sums[2].any() and not sums[3].any(), "W has no multipliers: nothing is computed twice"
            continue
        for dim in (1, 0):
            measured = sums[2 * k + 1 - dim].double()
            torch.testing.assert_close(measured, matrix.square().sum(dim), rtol=RELATIVE, atol=0.0)


def test_rms_and_variation_are_those_of_float64() -> None:
    weight, _, _ = drawn()
    wide = weight.double()
    squares = squares_of(weight, None, None)
    of_rows, of_cols = totals(torch.cat([squares.rows, squares.cols]), [ROWS, COLS])
    assert rms(of_rows[0], weight.numel()) == pytest.approx(wide.square().mean().sqrt().item(), rel=RELATIVE)
    for (total, roots), norms in ((of_rows, wide.norm(dim=1)), (of_cols, wide.norm(dim=0))):
        expected = (norms.std(correction=0) / norms.mean()).item()
        assert variation(total, roots, len(norms)) == pytest.approx(expected, rel=1e-5)
    assert of_rows != of_cols


def test_a_matrix_of_zeros_has_no_variation() -> None:
    assert math.isnan(variation(0.0, 0.0, 4)) and rms(0.0, 4) == 0.0


def test_nan_in_one_matrix_leaves_the_figures_of_others_alone() -> None:
    found = totals(torch.tensor([4.0, torch.nan, 9.0, 16.0]), [1, 1, 2])
    assert found[0] == (4.0, 2.0) and math.isnan(found[1][0]) and found[2] == (25.0, 7.0)


def test_names_have_metric_role_and_layer() -> None:
    assert layer_of("decoder.layers.3.mlp.linear_fc2.weight") == 3
    assert layer_of("decoder.final_layernorm.weight") is None
    assert key("weight_rms", "q", 3) == "weight_rms/q/layer_03"
    assert key("attention_logit_max", layer=103) == "attention_logit_max/layer_103"
    found = by_place("m", [("q", 0, 1.0), ("q", 1, 3.0), ("head", None, 7.0)], mean)
    assert found == {"m/q": 2.0, "m/q/layer_00": 1.0, "m/q/layer_01": 3.0, "m/head": 7.0}
