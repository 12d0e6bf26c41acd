"""Largest attention logits of each head, against all scores in float64."""

from __future__ import annotations

import pytest
import torch

from megamult.models.common import head_logits
from megamult.models.common.head_logits import HeadLogits, largest_attention_logits

SEQ, BATCH, HEADS, GROUPS, DIM = 11, 3, 6, 2, 4


@pytest.mark.parametrize("at_a_time", [1, 500, 1 << 20], ids=["one position", "some", "all"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_largest_logit_of_each_head_is_that_of_all_allowed_pairs(
    at_a_time: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_logits._SCORES, "cpu", at_a_time)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(SEQ, BATCH, HEADS, DIM, generator=generator)
    key = torch.randn(SEQ, BATCH, GROUPS, DIM, generator=generator)
    key[-1] *= 100  # only the last position may attend to it
    query[:-1, :, :, 0] += 50 * key[-1, 0, 0, 0].sign()  # the others would, and their logit would be the largest
    repeated = key.double().repeat_interleave(HEADS // GROUPS, dim=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), repeated) * (DIM**-0.5 if scale is None else scale)
    allowed = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    assert scores.max() > 2 * scores[..., allowed].max()
    expected = scores[..., allowed].amax(dim=(0, 2))
    assert expected.unique().numel() == HEADS
    found = largest_attention_logits(query, key, scale)
    # Sums of 4 products in fp32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SelfAttention with SdpaAttention, .*: leave multipliers.qk_"):
        HeadLogits(torch.nn.Linear(2, 2))
