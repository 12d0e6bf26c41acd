"""Largest attention logits of each head, against all scores in float64."""

from __future__ import annotations

import pytest
import torch

from megamult.models.common import head_logits
from megamult.models.common.head_logits import HeadLogits, largest_attention_logits
from tests.models.attention import AT_A_TIME, HEADS, MASKED, SCALES, mask, skewed_attention


@AT_A_TIME
@MASKED
@SCALES
def test_the_largest_logit_of_each_head_is_that_of_all_allowed_pairs(
    at_a_time: int, masked: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_logits._SCORES, "cpu", at_a_time)
    query, key, scores, allowed = skewed_attention(scale, masked)
    expected = scores.masked_fill(~allowed, -torch.inf).amax(dim=(0, 2, 3))
    assert expected.unique().numel() == HEADS
    found = largest_attention_logits(query, key, scale, mask(masked))
    # Sums of 4 products in fp32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SelfAttention with SdpaAttention, .*: leave multipliers.qk_"):
        HeadLogits(torch.nn.Linear(2, 2))
