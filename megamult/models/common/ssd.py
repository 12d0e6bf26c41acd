"""State-space duality (SSD), the sequence map of Mamba-2 (arXiv 2405.21060): by chunks, and step by step as reference.

Each head keeps a state h of [head_dim, state] and reads one token after the other:

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T          y_t = h_t C_t + D x_t

x_t [head_dim] is the token's input, dt_t > 0 its step size, A < 0 and D one number for each head. B_t and C_t [state]
are shared by the heads of a group. By chunks, the tokens of a chunk act on each other through a masked matrix product,
as in attention without softmax, and on later chunks through the state at the chunk's end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Tokens of a chunk by default: as many as let the products within a chunk and those with the state cost about the same
at states of 64 to 256."""


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the outputs y and the state after the last token.

    Decays and states are in fp32, or in fp64 if x is. Matrix products within a chunk are in the dtype of x.

    Args:
        x: [batch, seq, heads, head_dim] inputs.
        dt: [batch, seq, heads] step sizes, positive.
        a: [heads] rates of decay, negative.
        b, c: [batch, seq, groups, state]. Heads [i heads / groups, (i + 1) heads / groups) belong to group i.
        d: [heads] weights of the inputs in the outputs; None means 0.
        initial: [batch, heads, head_dim, state] state before the first token; None means 0.
        documents: [batch, seq] number of the document that each token belongs to, which never falls along a sequence.
            The state is 0 at the start of a document; `initial` is that of a document that token 0 continues. None
            means that all tokens belong to one document.
        chunk: tokens of a chunk. The result does not depend on it, up to rounding.

    Returns:
        y [batch, seq, heads, head_dim] in the dtype of x, and the state [batch, heads, head_dim, state] in that of
        decays.

    Raises:
        ValueError: the number of heads is no multiple of the number of groups, or `chunk` is below 1.
    """
    batch, seq, heads, head_dim = x.shape
    groups, state = b.shape[2:]
    if heads % groups or chunk < 1:
        raise ValueError(f"{heads} heads in {groups} groups, chunks of {chunk} tokens: give equal groups and chunks")
    accurate = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = dt.to(accurate)
    inputs = (x * steps.unsqueeze(-1)).to(x.dtype)
    # Tokens that fill the last chunk have dt 0: they neither decay the state nor add to it.
    size = min(chunk, max(seq, 1))
    fill = -seq % size
    chunks = (seq + fill) // size

    def cut(tensor: Tensor, axis: int) -> Tensor:
        """Return [batch, chunks, `axis`, size, ...] of [batch, seq, `axis`, ...]."""
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, fill))
        return padded.unflatten(1, (chunks, size)).transpose(2, 3) if axis else padded.unflatten(1, (chunks, size))

    # What is computed from decays by elements has their memory layout, and products need a contiguous one.
    decay = cut((steps * a.to(accurate)).unsqueeze(-1), 1).squeeze(-1).contiguous().cumsum(-1)
    u, keys, queries = cut(inputs, 1), cut(b, 1), cut(c, 1)  # [batch, chunks, heads or groups, size, ...]
    seen = _same_document(documents, fill, chunks, size, x.device)
    per_group = heads // groups

    # Within chunks: token i reads token j <= i of its document with the weight C_i . B_j exp(decay_i - decay_j).
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)  # [batch, chunks, heads, size, size]
    weights = between.masked_fill_(~seen.within, -torch.inf).exp_()
    products = (queries @ keys.transpose(-1, -2)).unsqueeze(3)  # [batch, chunks, groups, 1, size, size]
    weights = weights.unflatten(2, (groups, per_group)) * products
    y = (weights.to(x.dtype).flatten(2, 3) @ u).to(accurate)

    # What each chunk adds to the state at its end, and how much of the state before it is left then.
    to_end = (decay[..., -1:] - decay).masked_fill(~seen.to_end, -torch.inf).exp()
    weighted = (u * to_end.unsqueeze(-1)).unflatten(2, (groups, per_group))
    added = (weighted.transpose(-1, -2) @ keys.to(accurate).unsqueeze(3)).flatten(2, 3)
    left = decay[..., -1].exp() * seen.carried
    before = []
    carried = x.new_zeros(batch, heads, head_dim, state, dtype=accurate) if initial is None else initial.to(accurate)
    for i in range(chunks):
        before.append(carried)
        carried = carried * left[:, i, :, None, None] + added[:, i]

    # What each token reads from the state before its chunk.
    from_start = decay.masked_fill(~seen.from_start, -torch.inf).exp()
    if chunks:
        read = torch.stack(before, 1).unflatten(2, (groups, per_group)).transpose(-1, -2)
        reading = (queries.to(accurate).unsqueeze(3) @ read).flatten(2, 3)
        y = y + reading * from_start.unsqueeze(-1)
    y = y.transpose(2, 3).flatten(1, 2)[:, :seq]
    if d is not None:
        y = y + x * d.to(accurate).unsqueeze(-1)
    return y.to(x.dtype), carried


class _Seen(NamedTuple):
    """Masks of the tokens that act on each other, within chunks and over their ends: those of the same document."""

    within: Tensor
    """[batch or 1, chunks or 1, 1, size, size] whether token i reads token j."""
    to_end: Tensor
    """[batch or 1, chunks or 1, 1, size] whether a token adds to the state at the chunk's end."""
    carried: Tensor
    """[batch or 1, chunks or 1, 1] whether the state before a chunk is part of the state at its end."""
    from_start: Tensor
    """[batch or 1, chunks or 1, 1, size] whether a token reads the state before its chunk."""


def _same_document(documents: Tensor | None, fill: int, chunks: int, size: int, device: torch.device) -> _Seen:
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if documents is None:
        always = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return _Seen(within=causal[None, None, None], to_end=always, carried=always[0], from_start=always)
    # Tokens that fill the last chunk belong to the last document.
    of = torch.cat([documents, documents[:, -1:].expand(-1, fill)], 1).unflatten(1, (chunks, size))
    first, last = of[:, :1, :1], of[..., -1:]
    previous = torch.cat([first, last[:, :-1]], 1)
    return _Seen(
        within=((of.unsqueeze(-1) == of.unsqueeze(-2)) & causal).unsqueeze(2),
        to_end=(of == last).unsqueeze(2),
        carried=last == previous,
        from_start=(of == previous).unsqueeze(2),
    )


def recurrence(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`ssd` computes, with the same arguments, token by token as the formula says."""
    batch, seq, heads, head_dim = x.shape
    per_group = heads // b.shape[2]
    b, c = (each.repeat_interleave(per_group, 2) for each in (b, c))
    state = x.new_zeros(batch, heads, head_dim, b.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(seq):
        if documents is not None and t > 0:
            state = state * (documents[:, t] == documents[:, t - 1]).view(-1, 1, 1, 1)
        factor = (dt[:, t] * a).exp()[..., None, None]
        state = state * factor + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(-2)
        y = (state @ c[:, t].unsqueeze(-1)).squeeze(-1)
        outputs.append(y if d is None else y + x[:, t] * d.unsqueeze(-1))
    return torch.stack(outputs, 1), state
