"""Documents in one sequence that do not see each other: positions and attention mask from the token ids.

A document ends with the end-of-document token, which belongs to the document that it ends. The last token of a sequence
may be in the middle of a document, and so may the first one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS = "document_positions"
"""Name of the argument of a decoder with the positions of tokens in their documents, [batch, seq], or None
(:func:`megamult.models.common.rotary_embedding.once_for_all_layers`)."""


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


def first_tokens(positions: Tensor) -> Tensor:
    """Return the index in the sequence of the first token of each token's document, which numbers the documents.

    Args:
        positions: [batch, seq] positions of tokens in their documents.

    Returns:
        [batch, seq] indices, which never fall along a sequence.
    """
    return torch.arange(positions.shape[1], device=positions.device) - positions


def attention_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention logits: 0 where a query may attend to a key, and -inf elsewhere.

    A query may attend to the keys of its own document that do not come after it. All layers can use the same mask, so
    that it is in memory only once, seq^2 numbers for each sequence.

    Args:
        documents: [batch, seq] index of the first token of each token's document.
        dtype: dtype of the mask, that of the queries.

    Returns:
        [batch, 1, query, key] mask.
    """
    at = torch.arange(documents.shape[1], device=documents.device)
    allowed = (at >= documents.unsqueeze(-1)) & (at <= at.unsqueeze(-1))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~allowed, -torch.inf).unsqueeze(1)


class DocumentMask(NamedTuple):
    """Documents of the tokens, in the place of Megatron's attention mask, which every layer gets.

    It is a tuple, because DeepSpeed looks for tensors in the arguments of modules, and does so in tuples.
    """

    documents: Tensor
    """[batch, seq] index of the first token of each token's document."""
    added: Tensor | None
    """[batch, 1, query, key] numbers to add to the attention logits; None if no layer has attention."""
