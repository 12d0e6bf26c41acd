"""Matrix products whose result is known to be symmetric, such as XX^T; only about half is computed. No gradients. Pure.

On CUDA in half precision a Triton kernel computes the tiles on and below the diagonal
(:mod:`megamult.optim.muon.symmetric_triton`): little more than half of a large product. Elsewhere torch computes block
rows up to the diagonal: five eighths. MEGAMULT_TRITON=0 in the environment selects torch on CUDA too.
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
"""Number of block rows of a product: 5/8 of the multiplications. More blocks save little more, and are slower."""
_SMALLEST_BLOCK = 64

_FEWEST_ROWS = 512
"""Smallest size at which the kernel computes no more elements than block rows do."""
_MULTIPLE = 16
"""Number that divides the sizes: with others the kernel would load single elements."""


def symmetric_product(
    left: Tensor, right: Tensor, *, add: tuple[float, Tensor] | None = None, alpha: float = 1.0
) -> Tensor:
    """Return alpha left @ right (+ beta C if `add` is (beta, C)), a matrix that is known to be symmetric.

    Args:
        left: [batch, n, depth] operand.
        right: [batch, depth, n] operand of the same dtype.
        add: (beta, C) with a symmetric C[batch, n, n]; None: nothing is added.
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
    """Compute :func:`symmetric_product` by torch's own products: block rows up to the diagonal, then mirrored."""
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

    Costs are weighed by this number on every device: the kernel computes fewer, which changes all costs nearly alike.
    """
    return sum((hi - lo) * hi for lo, hi in _bounds(n))


def _bounds(n: int) -> list[tuple[int, int]]:
    count = max(1, min(_BLOCKS, n // _SMALLEST_BLOCK))
    bounds = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _has_kernel(device: torch.device) -> bool:
    """Return whether the Triton kernel runs on this device: it is for NVIDIA's GPUs since Ampere."""
    return (
        device.type == "cuda"
        and "lower_tiles" in globals()
        and os.environ.get("MEGAMULT_TRITON") != "0"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
