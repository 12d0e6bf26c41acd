"""Triton kernel for symmetric matrix products: it computes the tiles on and below the diagonal, and mirrors them.

One kernel with one tile size is used for all shapes. No setting is chosen by timing, so equal operands give equal bits
in every run. :mod:`megamult.optim.muon.symmetric` imports this module only if torch is built for CUDA and Triton is
installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

TILE = 128
"""Number of rows, and of columns, that one program computes. On Hopper each of its two warp groups has 64 rows."""
CONSTANTS = {
    "TILE": TILE,
    "DEPTH": 64,  # elements of the inner dimension per step; 128 bytes, the width of swizzled shared memory
    "GROUP": 8,  # rows of tiles that are processed together, so that their operands stay in the L2 cache
}
OPTIONS = {
    "num_warps": 8,
    # Each stage holds a tile of each operand. Three take 96 KiB of shared memory, which every GPU since Ampere has.
    "num_stages": 3,
    "enable_fp_fusion": True,  # set here, because Triton's default changes between versions
}


@triton.jit
def _lower_tiles(  # type: ignore[no-untyped-def]  # Triton infers the types
    left,
    right,
    add,
    out,
    n,
    depth,
    alpha,
    beta,
    left_batch,
    left_row,
    left_col,
    right_batch,
    right_row,
    right_col,
    HAS_ADD: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(n, TILE)
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = program // (GROUP * tiles) * GROUP
    height = min(tiles - first, GROUP)
    i = first + program % (GROUP * tiles) % height
    j = program % (GROUP * tiles) // height
    if j > i:
        return
    # Indices past the end wrap around, so that loads stay inside the operands. Results for them are not stored.
    rows = ((i * TILE + tl.arange(0, TILE)) % n).to(tl.int64)
    cols = ((j * TILE + tl.arange(0, TILE)) % n).to(tl.int64)
    inner = tl.arange(0, DEPTH)
    left_at = left + batch * left_batch + rows[:, None] * left_row + inner[None, :] * left_col
    right_at = right + batch * right_batch + inner[:, None] * right_row + cols[None, :] * right_col
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        a = tl.load(left_at, mask=inside[None, :], other=0.0)
        b = tl.load(right_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left_at += DEPTH * left_col
        right_at += DEPTH * right_row
    total *= alpha
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    at = batch * n * n + rows[:, None] * n + cols[None, :]
    inside = (rows < n)[:, None] & (cols < n)[None, :]
    if HAS_ADD:
        total += beta * tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=inside)
    if i != j:
        mirrored = batch * n * n + cols[:, None] * n + rows[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=tl.trans(inside))


@torch.library.custom_op("megamult::lower_tiles", mutates_args={"out"})
def lower_tiles(left: Tensor, right: Tensor, out: Tensor, add: Tensor | None, beta: float, alpha: float) -> None:
    """Compute :func:`megamult.optim.muon.symmetric.symmetric_product` with the Triton kernel, accumulating in fp32.

    `out` gets `alpha * left @ right`, plus `beta * add` if `add` is given. The function is registered as an operator
    so that torch's FLOP counter counts it. It has no gradient.
    """
    batch, n, depth = left.shape
    square = (batch, n, n)
    if right.shape != (batch, depth, n) or any(t is not None and t.shape != square for t in (out, add)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (left, right, out, add) if t is not None)
        raise ValueError(f"operands of the shapes {shapes}: they must be [b, n, k], [b, k, n], [b, n, n] and [b, n, n]")
    if not out.is_contiguous():
        raise ValueError(f"out has the strides {out.stride()}: it must be contiguous")
    tiles = triton.cdiv(n, TILE)
    with torch.cuda.device_of(left):
        _lower_tiles[(tiles * tiles, batch)](
            left,
            right,
            out if add is None else add.contiguous(),
            out,
            n,
            depth,
            alpha,
            beta,
            *left.stride(),
            *right.stride(),
            HAS_ADD=add is not None,
            **CONSTANTS,
            **OPTIONS,
        )


@lower_tiles.register_fake
def _fake(left: Tensor, right: Tensor, out: Tensor, add: Tensor | None, beta: float, alpha: float) -> None:
    return None


@register_flop_formula(torch.ops.megamult.lower_tiles)
def _flops(left: tuple[int, ...], *_: object, **__: object) -> int:
    """Return the floating-point operations of a call. A partly filled tile counts as a whole one."""
    batch, n, depth = left
    tiles = triton.cdiv(n, TILE)
    return batch * tiles * (tiles + 1) * TILE * TILE * depth
