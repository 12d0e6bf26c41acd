"""Matrix products whose result is symmetric, such as XX^T, in one of three ways.

- `whole`: torch computes the whole product. It is the fastest way where matrix units make FLOPs cheap and copies dear.
- `block_rows`: torch computes block rows up to the diagonal, and the rest is copied from their mirror image: five
  eighths of a product with 256 or more rows, and more of a smaller one.
- `kernel`: on CUDA, in bf16 and fp16, a Triton kernel computes the tiles on and below the diagonal, which are little
  more than half of a large product, and writes each of them to both places
  (:mod:`megamult.optim.muon.symmetric_triton`). MEGAMULT_TRITON=0 in the environment turns it off.

The functions do not change their operands, and have no gradients.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from typing import Literal

import torch
from torch import Tensor

if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
    from megamult.optim.muon.symmetric_triton import lower_tiles

Products = Literal["whole", "block_rows", "kernel"]

_BLOCKS = 4
"""Number of block rows of a product. With 4, torch computes 5/8 of it. More would save little, and be slower."""
_SMALLEST_BLOCK = 64

_FEWEST_ROWS = 512
"""Smallest n for which the kernel computes no more elements of an [n, n] product than :func:`block_rows`."""
_MULTIPLE = 16
"""Number that n and depth must be multiples of, because the kernel would otherwise load single elements."""


def symmetric_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    products: Products,
    *,
    add: tuple[float, Tensor] | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """Compute alpha left @ right, plus beta C if `add` is (beta, C), which the caller guarantees to be symmetric.

    Args:
        left: [batch, n, depth] operand.
        right: [batch, depth, n] operand of the same dtype.
        out: [batch, n, n] result in the operands' dtype; not one of the operands.
        products: the way to compute it. `kernel` must suit the operands (:func:`kernel_suits`), and the device have it
            (:func:`has_kernel`).
        add: (beta, C) with a symmetric C[batch, n, n]; None to add nothing.
        alpha: factor of the product.

    Returns:
        `out`.
    """
    beta, c = (0.0, None) if add is None else add
    if products == "kernel":
        lower_tiles(left, right, out, c, beta, alpha)
    elif products == "block_rows":
        _block_rows(left, right, out, c, beta, alpha)
    else:
        product(left, right, out, c, beta, alpha)
    return out


def product(
    left: Tensor, right: Tensor, out: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """Compute alpha left @ right, plus beta add if `add` is given, into `out`. All are batches of matrices.

    A batch of one matrix is computed by torch's functions for matrices, which on CPUs take less time per call.
    """
    if left.shape[0] == 1:
        left, right, out, add = left[0], right[0], out[0], None if add is None else add[0]
    multiply, multiply_and_add = (torch.mm, torch.addmm) if left.dim() == 2 else (torch.bmm, torch.baddbmm)
    if add is not None:
        multiply_and_add(add, left, right, beta=beta, alpha=alpha, out=out)
    else:
        multiply(left, right, out=out)
        if alpha != 1.0:
            out.mul_(alpha)


def _block_rows(left: Tensor, right: Tensor, out: Tensor, add: Tensor | None, beta: float, alpha: float) -> None:
    for lo, hi in _bounds(left.shape[1]):
        rows = out[:, lo:hi, :hi]
        product(left[:, lo:hi], right[:, :, :hi], rows, None if add is None else add[:, lo:hi, :hi], beta, alpha)
        out[:, :lo, lo:hi] = rows[:, :, :lo].mT


def computed(n: int) -> int:
    """Return how many elements of an [n, n] product are computed by block rows."""
    return sum((hi - lo) * hi for lo, hi in _bounds(n))


def _bounds(n: int) -> list[tuple[int, int]]:
    count = max(1, min(_BLOCKS, n // _SMALLEST_BLOCK))
    bounds = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def kernel_suits(n: int, depth: int, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernel computes [n, depth] @ [depth, n] products of this dtype well."""
    return n >= _FEWEST_ROWS and n % _MULTIPLE == depth % _MULTIPLE == 0 and dtype in (torch.bfloat16, torch.float16)


def has_kernel(device: torch.device) -> bool:
    """Return whether the Triton kernel runs on this device: on an NVIDIA GPU of Ampere or later, where Triton is."""
    return (
        device.type == "cuda"
        and "lower_tiles" in globals()
        and os.environ.get("MEGAMULT_TRITON") != "0"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
