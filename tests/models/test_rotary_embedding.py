"""Tests of the rotation of queries and keys."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megamult.models.common.documents import POSITIONS
from megamult.models.common.rotary_embedding import (
    Rotation,
    _turned,
    _turned_in_one,
    once_for_all_layers,
    rotate,
    rotation,
)

SEQ, BATCH, HEADS, DIM = 7, 3, 2, 8


def angles() -> Tensor:
    """Return the angles that Megatron gives to its layers, [seq, 1, 1, dim] in float64."""
    half = torch.arange(SEQ, dtype=torch.float64).outer(10.0 ** -torch.arange(DIM // 2, dtype=torch.float64))
    return torch.cat((half, half), -1)[:, None, None]


def test_queries_are_rotated_as_megatron_rotates_them() -> None:
    x = torch.randn(SEQ, BATCH, HEADS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # One rounding of a sum of two products in float64 separates the two.
    torch.testing.assert_close(
        rotate(x, rotation(angles(), x.dtype)), _apply_rotary_pos_emb_bshd(x, angles()), rtol=1e-14, atol=1e-14
    )


def test_gradients_are_rotated_back() -> None:
    x = torch.randn(SEQ, BATCH, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation(angles(), x.dtype)), (x,))


def test_attention_reads_rotated_queries_without_a_copy() -> None:
    assert (
        rotate(torch.randn(SEQ, BATCH, HEADS, DIM), rotation(angles(), torch.float32))
        .permute(1, 2, 0, 3)
        .is_contiguous()
    )


@pytest.mark.parametrize("batch", [1, BATCH], ids=["one for all sequences", "one for each sequence"])
def test_the_form_that_is_compiled_for_cuda_computes_the_same(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, HEADS, SEQ, DIM, generator=generator)
    by = rotation(torch.randn(SEQ, batch, 1, DIM, generator=generator), torch.float32)
    torch.testing.assert_close(_turned(x, *by), _turned_in_one(x, *by))
    assert _turned_in_one(x, *by).is_contiguous()


def test_positions_begin_anew_in_each_document() -> None:
    # The first sequence is one document, in the second one a document begins at token 3.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    hidden = torch.empty(0, dtype=torch.float64)
    given = {"hidden_states": hidden, "rotary_pos_emb": angles(), POSITIONS: positions}
    _, changed = once_for_all_layers(torch.nn.Identity(), (), given)
    by = changed["rotary_pos_emb"]
    assert isinstance(by, Rotation) and POSITIONS not in changed
    x = torch.randn(SEQ, 2, HEADS, DIM, dtype=torch.float64)
    rotated, whole = rotate(x, by), rotation(angles(), torch.float64)
    torch.testing.assert_close(rotated[:, :1], rotate(x[:, :1], whole))
    restarted = rotate(x[3:, 1:], Rotation(*(each[:, :, : SEQ - 3] for each in whole)))
    torch.testing.assert_close(rotated[3:, 1:], restarted)
