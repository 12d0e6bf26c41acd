"""Queries and keys whose largest logits are of pairs that causal attention does not allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamult.models.common.documents import attention_mask

SEQ, BATCH, HEADS, GROUPS, DIM = 11, 3, 6, 2, 4

DOCUMENTS = torch.tensor([[0] * 11, [0] * 4 + [1] * 7, [0] * 2 + [1] + [2] * 8])
"""Number of the document of each token, [batch, seq]."""
AT_A_TIME = pytest.mark.parametrize("at_a_time", [1, 500, 1 << 20], ids=["one position", "some", "all"])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
SCALES = pytest.mark.parametrize("scale", [None, 0.3])


def skewed_attention(scale: float | None, masked: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, their logits [batch, heads, query, key] in float64, and the allowed pairs, of the same shape.

    Args:
        masked: whether the documents of a sequence, DOCUMENTS, do not attend to each other.
    """
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(SEQ, BATCH, HEADS, DIM, generator=generator)
    key = torch.randn(SEQ, BATCH, GROUPS, DIM, generator=generator)
    key[-1] *= 100  # only the last position may attend to it
    query[:-1, :, :, 0] += 50 * key[-1, 0, 0, 0].sign()  # the others would, and their logit would be the largest
    repeated = key.double().repeat_interleave(HEADS // GROUPS, dim=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), repeated) * (DIM**-0.5 if scale is None else scale)
    allowed = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(scores.shape).clone()
    if masked:
        allowed &= (DOCUMENTS.unsqueeze(2) == DOCUMENTS.unsqueeze(1)).unsqueeze(1)
    assert scores.max() > 2 * scores[allowed].max()
    return query, key, scores, allowed


def mask(masked: bool) -> Tensor | None:
    """The mask that attention gets."""
    if not masked:
        return None
    first = (DOCUMENTS.unsqueeze(2) == DOCUMENTS.unsqueeze(1)).int().argmax(2)  # where the document begins
    return attention_mask(first, torch.float32)
