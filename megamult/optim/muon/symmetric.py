"""Matrix products whose result is symmetric, such as XX^T: only a part is computed, and the rest is its mirror image.

On CUDA, in bf16 and fp16, a Triton kernel computes the tiles on and below the diagonal of products whose size suits it
(:mod:`megamult.optim.muon.symmetric_triton`). These tiles are little more than half of a large product. In all other
cases, torch computes block rows up to the diagonal: five eighths of a product with 256 or more rows, and more of a
smaller one. MEGAMULT_TRITON=0 in the environment selects torch on CUDA too. The functions do not change their operands,
and have no gradients.
"""

from __future__ import annotations

import importlib.util
import itertools
import os

import torch
from torch import Tensor

if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
    from megamult.optim.muon.symmetric_triton import lower_tiles

_BLOCKS = 4
"""Number of block rows of a product. With 4, torch computes 5/8 of it. More would save little, and be slower."""
_SMALLEST_BLOCK = 64

_FEWEST_ROWS = 512
"""Smallest n for which the kernel computes no more elements of an [n, n] product than :func:`block_rows`."""
_MULTIPLE = 16
"""Number that n and depth must be multiples of, because the kernel would otherwise load single elements."""


def symmetric_product(
    left: Tensor, right: Tensor, *, add: tuple[float, Tensor] | None = None, alpha: float = 1.0
) -> Tensor:
    """Return alpha left @ right, plus beta C if `add` is (beta, C). The caller guarantees that the result is symmetric.

    Args:
        left: [batch, n, depth] operand.
        right: [batch, depth, n] operand of the same dtype.
        add: (beta, C) with a symmetric C[batch, n, n]; None to add nothing.
        alpha: factor of the product.

    Returns:
        [batch, n, n] result in the operands' dtype.
    """
    beta, c = (0.0, None) if add is None else add
    _, n, depth = left.shape
    suits = n >= _FEWEST_ROWS and n % _MULTIPLE == depth % _MULTIPLE == 0
    if suits and left.dtype in (torch.bfloat16, torch.float16) and _has_kernel(left.device):
        return lower_tiles(left, right, c, beta, alpha)
    return block_rows(left, right, c, beta, alpha)


def block_rows(left: Tensor, right: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Compute :func:`symmetric_product` with torch: block rows up to the diagonal, which are then mirrored."""
    batch, n = left.shape[:2]
    out = torch.empty(batch, n, n, dtype=left.dtype, device=left.device)
    for lo, hi in _bounds(n):
        if add is None:
            rows = torch.bmm(left[:, lo:hi], right[:, :, :hi])
            out[:, lo:hi, :hi] = rows if alpha == 1.0 else rows.mul_(alpha)
        else:
            out[:, lo:hi, :hi] = torch.baddbmm(
                add[:, lo:hi, :hi], left[:, lo:hi], right[:, :, :hi], beta=beta, alpha=alpha
            )
        out[:, :lo, lo:hi] = out[:, lo:hi, :lo].mT
    return out


def computed(n: int) -> int:
    """Return how many elements of an [n, n] product :func:`block_rows` computes.

    The costs of matrices (:func:`megamult.optim.muon.newton_schulz.flops`) are computed from this number on every
    device. The Triton kernel computes fewer elements, but this lowers the costs of all matrices by nearly the same
    factor, so that owners chosen by these costs remain balanced.
    """
    return sum((hi - lo) * hi for lo, hi in _bounds(n))


def _bounds(n: int) -> list[tuple[int, int]]:
    count = max(1, min(_BLOCKS, n // _SMALLEST_BLOCK))
    bounds = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _has_kernel(device: torch.device) -> bool:
    """Return whether to use the Triton kernel on this device. It needs an NVIDIA GPU of Ampere or later."""
    return (
        device.type == "cuda"
        and "lower_tiles" in globals()
        and os.environ.get("MEGAMULT_TRITON") != "0"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
