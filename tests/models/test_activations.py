"""What the hooks measure, against the whole tensors in float64."""

from __future__ import annotations

import pytest
import torch

from megamult.models.common import head_logits
from megamult.models.common.activations import attention_logits, sum_of_squares
from tests.models.attention import AT_A_TIME, MASKED, SCALES, mask, skewed_attention


@AT_A_TIME
@MASKED
@SCALES
def test_attention_logits_are_measured_over_all_allowed_pairs(
    at_a_time: int, masked: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_logits._SCORES, "cpu", at_a_time)
    query, key, scores, allowed = skewed_attention(scale, masked)
    # Squares of what is not allowed would make the sum several times as large.
    assert scores.square().sum() > 2 * scores[allowed].square().sum()
    squares, count, largest = attention_logits(query, key, scale, mask(masked))
    assert largest.item() == pytest.approx(scores[allowed].max().item(), rel=1e-5)
    assert squares.item() == pytest.approx(scores[allowed].square().sum().item(), rel=1e-5)
    assert count == scores[allowed].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_summed_in_full_precision_also_of_a_part_of_the_columns(dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    part = values[..., :41]
    assert sum_of_squares(part).item() == pytest.approx(part.double().square().sum().item(), rel=1e-6)
    assert sum_of_squares(values[..., :0]).item() == 0.0
