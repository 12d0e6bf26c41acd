"""SSD by chunks is the recurrence, for every chunk size, length, number of groups, initial state and documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamult.models.common.ssd import recurrence, ssd

HEADS, HEAD_DIM, STATE = 4, 6, 5

Inputs = dict[str, Tensor]


def inputs(seq: int, groups: int, *, initial: bool = True, documents: bool = False) -> tuple[Inputs, Tensor | None]:
    """Random inputs in float64, with decays per token between exp(-16) and 1, and documents of random lengths."""
    generator = torch.Generator().manual_seed(seq * 10 + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    found = {
        "x": normal(2, seq, HEADS, HEAD_DIM),
        "dt": torch.rand(2, seq, HEADS, dtype=torch.float64, generator=generator),
        "a": -16 * torch.rand(HEADS, dtype=torch.float64, generator=generator),
        "b": normal(2, seq, groups, STATE),
        "c": normal(2, seq, groups, STATE),
        "d": normal(HEADS),
    }
    if initial:
        found["initial"] = normal(2, HEADS, HEAD_DIM, STATE)
    starts = torch.rand(2, seq, generator=generator) < 0.2
    return found, starts.cumsum(1) if documents else None


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize(
    ("seq", "groups", "chunk"), [(64, 1, 16), (37, 2, 16), (37, 4, 128), (130, 1, 128), (5, 2, 1), (1, 1, 8)]
)
def test_chunks_compute_the_recurrence_and_its_gradients(
    seq: int, groups: int, chunk: int, initial: bool, documents: bool
) -> None:
    given, of = inputs(seq, groups, initial=initial, documents=documents)
    leaves = [value.requires_grad_() for value in given.values()]
    expected = recurrence(**given, documents=of)
    found = ssd(**given, documents=of, chunk=chunk)
    weights = [torch.randn_like(value) for value in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # sums of up to 130 terms in another order
    gradients = [
        torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, each, strict=True)), leaves)
        for each in (found, expected)
    ]
    for name, one, other in zip(given, *gradients, strict=True):
        assert (one - other).abs().max() <= 1e-12 * (1 + other.abs().max()), name


def test_documents_are_as_if_each_were_alone() -> None:
    given, _ = inputs(40, 2, initial=False)
    lengths = [7, 1, 20, 12]
    of = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    found, state = ssd(**given, documents=of, chunk=16)
    alone = []
    for start, length in zip((0, 7, 8, 28), lengths, strict=True):
        own = {name: v[:, start : start + length] if v.dim() > 2 else v for name, v in given.items()}
        y, last = ssd(**own, chunk=16)
        alone.append(y)
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_a_sequence_continued_from_its_state_is_the_whole_sequence() -> None:
    given, _ = inputs(50, 1)
    whole, end = ssd(**given, chunk=16)
    first = {name: value[:, :23] if value.dim() > 2 and name != "initial" else value for name, value in given.items()}
    second = {name: value[:, 23:] if value.dim() > 2 and name != "initial" else value for name, value in given.items()}
    y, state = ssd(**first, chunk=16)
    z, last = ssd(**second | {"initial": state}, chunk=16)
    torch.testing.assert_close(torch.cat([y, z], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "error"),
    # fp32: cumulative decays reach 128 x 8 and are rounded to 2^-24 of that, so weights within a chunk are off by up to
    # 6e-5; most are off by much less. bf16: two factors and the result are rounded to 2^-9 each.
    [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)],
)
def test_rounding_errors_stay_those_of_the_dtype(dtype: torch.dtype, error: float) -> None:
    given, _ = inputs(300, 1)
    narrow = {
        name: value.to(dtype) if name in ("x", "b", "c") else value.to(torch.float32) for name, value in given.items()
    }
    exact, _ = recurrence(**{name: value.double() for name, value in narrow.items()})
    found, state = ssd(**narrow)
    assert found.dtype == dtype and state.dtype == torch.float32
    assert (found.double() - exact).norm() / exact.norm() < error


def test_unequal_groups_are_refused() -> None:
    given, _ = inputs(4, 3)
    with pytest.raises(ValueError, match="4 heads in 3 groups, chunks of 128 tokens"):
        ssd(**given)
