"""Products of matrices that are known to be symmetric, of which only about half is computed. Pure.

XX^T, and every product of polynomials in it. On CUDA in half precision a Triton kernel computes the tiles on and below
the diagonal (:mod:`megamult.optim.symmetric_triton`); everywhere else torch's products compute block rows up to it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools

import torch
from torch import Tensor

_BLOCKS = 4
"""Block rows of a product: 5/8 of the multiplications. More blocks save little more, and are slower."""
_SMALLEST_BLOCK = 64

TILE = 128
"""Rows and columns that one program of the Triton kernel computes: two warp groups of Hopper, 64 rows each. A product
of one tile is computed whole, which a plain product does as well."""


def symmetric_product(
    left: Tensor, right: Tensor, *, add: tuple[float, Tensor] | None = None, alpha: float = 1.0
) -> Tensor:
    """alpha left @ right (+ beta C for `add` = (beta, C)), where that is known to be symmetric.

    Args:
        left: [batch, n, depth].
        right: [batch, depth, n], of the same dtype.
        add: beta and the symmetric C[batch, n, n].
        alpha: a factor.

    Returns:
        [batch, n, n] in the operands' dtype; sums are fp32 or wider.
    """
    beta, c = (0.0, None) if add is None else add
    if left.shape[1] > TILE and left.dtype in (torch.bfloat16, torch.float16) and _has_triton(left.device):
        from megamult.optim.symmetric_triton import lower_tiles

        return lower_tiles(left, right, c, beta, alpha)
    return block_rows(left, right, c, beta, alpha)


def block_rows(left: Tensor, right: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    """:func:`symmetric_product` by torch's own products: block rows up to the diagonal, mirrored."""
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
    """Elements of an [n, n] product that :func:`block_rows` computes. It stands for costs on every device, though the
    Triton kernel computes fewer of large matrices: what is weighed by it are the same products everywhere."""
    return sum((hi - lo) * hi for lo, hi in _bounds(n))


def _bounds(n: int) -> list[tuple[int, int]]:
    count = max(1, min(_BLOCKS, n // _SMALLEST_BLOCK))
    bounds = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether the kernel runs there: its tile sizes are for NVIDIA GPUs since Ampere."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
