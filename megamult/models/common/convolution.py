"""Causal depthwise convolution over the tokens of a sequence, as Mamba's mixers have it. It does no communication."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """Return y_t = bias + sum over j < kernel of weight[:, 0, kernel - 1 - j] x_(t - j), channel by channel.

    Args:
        x: [batch, seq, channels].
        weight: [channels, 1, kernel].
        bias: [channels], or None.
        documents: [batch, seq] number of the document of each token; a token reads none of another document. None means
            that all belong to one.

    Returns:
        [batch, seq, channels].
    """
    kernel, seq = weight.shape[-1], x.shape[1]
    if documents is None:
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel - 1, groups=x.shape[-1])[..., :seq].transpose(
            1, 2
        )
    y = x * weight[:, 0, -1]
    for j in range(1, min(kernel, seq)):
        same = documents[:, j:] == documents[:, :-j]
        y = y + F.pad(x[:, :-j] * weight[:, 0, -1 - j] * same.unsqueeze(-1).to(x.dtype), (0, 0, j, 0))
    return y if bias is None else y + bias
