"""Documents in one sequence that do not see each other: positions and attention mask from the token ids.

A document ends with the end-of-document token, which belongs to the document that it ends. The last token of a sequence
may be in the middle of a document, and so may the first one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POSITIONS = "document_positions"
"""Name of the argument of a decoder that :func:`restart_positions` reads."""


def positions_in_documents(tokens: Tensor, end: int) -> Tensor:
    """Return the position of each token in its document, counted from 0.

    In the first document of a sequence, positions are counted from the beginning of the sequence.

    Args:
        tokens: [batch, seq] ids.
        end: id of the end-of-document token.

    Returns:
        [batch, seq] positions.
    """
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def attention_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention logits: 0 where a query may attend to a key, and -inf elsewhere.

    A query may attend to the keys of its own document that do not come after it. All layers can use the same mask, so
    that it is in memory only once, seq^2 numbers for each sequence.

    Args:
        positions: [batch, seq] positions of tokens in their documents.
        dtype: dtype of the mask, that of the queries.

    Returns:
        [batch, 1, query, key] mask.
    """
    at = torch.arange(positions.shape[1], device=positions.device)
    first = (at - positions).unsqueeze(-1)  # [batch, query, 1]: where the query's document begins
    allowed = (at >= first) & (at <= at.unsqueeze(-1))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, -torch.inf).unsqueeze(1)


def documents_of(attention_mask: Tensor | None) -> Tensor | None:
    """Return the number of each token's document, [batch, seq], or None if all tokens of a sequence are in one.

    The number of a document is the position of its first token, which is the first key that its tokens may attend to.

    Args:
        attention_mask: [batch, 1, query, key] numbers to add to the attention logits, 0 where a query may attend to a
            key; None, or a mask of booleans as Megatron makes it, is the causal mask.
    """
    if attention_mask is None or not attention_mask.is_floating_point():
        return None
    return (attention_mask[:, 0] == 0).to(torch.uint8).argmax(-1)


def restart_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give Megatron's TransformerBlock rotary angles of positions in documents. This is a forward pre-hook.

    The block's argument `rotary_pos_emb`, [seq, 1, 1, dim], has the angles of positions in the sequence. It becomes
    [seq, batch, 1, dim], by the argument :data:`POSITIONS` ([batch, seq]), which the block itself does not have.
    """
    positions = kwargs.pop(POSITIONS)
    angles = kwargs["rotary_pos_emb"][positions.transpose(0, 1), 0]  # [seq, batch, 1, dim]
    return args, {**kwargs, "rotary_pos_emb": angles}
