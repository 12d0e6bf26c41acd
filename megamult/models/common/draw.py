"""Normal numbers by index: element i of a named tensor has one value, on every rank and in any order of drawing.

A number is a function of (seed, name, i) only: SplitMix64's output i for a key of seed and name, put through the
inverse of the normal distribution. So a rank draws only what it holds, and every sharding and device gives the same
model, bitwise: the computation uses integers, and fp64 multiplications, additions and subtractions, which IEEE 754
rounds in one way, each in a tensor operation of its own (a compiler must not fuse them); logarithms, whose last bit
differs between libraries, occur only in a table that is computed in decimal arithmetic.

The inverse is a cubic in each of 64 equal pieces of each octave of the tail's probability, down to 2^-53: absolute
error below 5e-10, a hundredth of the rounding to fp32 at 1; |z| at most 8.3. Source of the generator: Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal, localcontext
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PIECE_BITS = 6
"""Number of pieces of an octave, as a power of two."""
_OCTAVES = 53
_BLOCK = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Numbers that are drawn at once: few enough on a CPU for its cache, enough on a GPU to start few kernels."""


def key(seed: int, name: str) -> int:
    """Return the 64-bit key of the tensor `name` under `seed`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@torch.no_grad()
def fill_normal(target: Tensor, std: float, key: int, row: int, col: int, columns: int) -> None:
    """Set a rectangle of a matrix to its elements of N(0, std^2).

    Args:
        target: [height, width], any dtype; values are rounded to fp32, then to that dtype.
        std: standard deviation.
        key: key of the matrix (:func:`key`).
        row, col: position in the matrix at which the rectangle begins.
        columns: number of columns of the whole matrix: element (r, c) has index r * columns + c.
    """
    height, width = target.shape
    block = _BLOCK[target.device.type]
    # Indices of whole rows are consecutive: they are drawn as one long row.
    if width == columns and target.is_contiguous():
        target, row, col, height, width = target.view(1, -1), 0, row * columns + col, 1, height * width
        columns = 0
    tall = max(1, block // width)
    wide = min(block, width)
    steps = torch.arange(wide, device=target.device) * _signed(_GOLDEN)
    rows = torch.arange(tall, device=target.device).unsqueeze(1) * _signed(columns * _GOLDEN)
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            piece = target[top : top + tall, left : left + wide]
            first = key + ((row + top) * columns + col + left + 1) * _GOLDEN
            state = steps[: piece.shape[1]] + _signed(first) + rows[: piece.shape[0]]
            piece.copy_(_normal(_mixed(state)).mul_(std).to(torch.float32))


def _signed(value: int) -> int:
    """Return the signed 64-bit integer, as torch computes with, that has the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift repeats the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(state: Tensor) -> Tensor:
    """Turn each state into SplitMix64's output, in place."""
    state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(_FIRST))
    state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(_SECOND))
    return state.bitwise_xor_(_shifted(state, 31))


def _normal(bits: Tensor) -> Tensor:
    """Return normal fp64 numbers from 64 random bits each: 52 give the tail's probability, the lowest one the sign."""
    tail = (bits >> 11).bitwise_and_((1 << 53) - 2).bitwise_or_(1)  # odd, in [1, 2^53): 2^54 times the probability
    magnitude = tail.to(torch.float64).view(torch.int64)
    piece = (magnitude >> (52 - _PIECE_BITS)).sub_(1023 << _PIECE_BITS)
    # The rest of the mantissa, as a number in [-1/2, 1/2) of the piece's width.
    magnitude.bitwise_and_((1 << (52 - _PIECE_BITS)) - 1).bitwise_or_(1023 << 52)
    t = magnitude.view(torch.float64).sub_(1.0 + 2.0 ** -(_PIECE_BITS + 1)).mul_(2.0**_PIECE_BITS)
    constant, linear, square, cube = _table(bits.device)
    flat = piece.view(-1)
    z = cube.index_select(0, flat).view_as(t)
    for coefficients in (square, linear, constant):
        z.mul_(t).add_(coefficients.index_select(0, flat).view_as(t))
    z.view(torch.int64).bitwise_xor_(bits << 63)
    return z


@lru_cache(maxsize=8)
def _table(device: torch.device) -> tuple[Tensor, ...]:
    """Return the coefficients on `device`, [pieces] each, beginning with the constant."""
    # NumPy makes the table: `deepspeed.zero.Init` casts what torch.tensor and similar functions make to the model's
    # dtype.
    columns = torch.from_numpy(np.array(_coefficients()).T.copy())
    return tuple(column.to(device) for column in columns)


@lru_cache(maxsize=1)
def _coefficients() -> list[tuple[float, ...]]:
    """Return Taylor's coefficients of the quantile z(p) of the upper tail about the middle of each piece.

    With phi the density, z' = -1 / phi(z), z'' = z z'^2, z''' = (1 + 2 z^2) z'^3. The values that fp64 gives are
    corrected in decimal arithmetic, so that the rounded coefficients are the same on every machine.
    """
    rows: list[tuple[float, ...]] = []
    normal = NormalDist()
    with localcontext() as context:
        context.prec = 45
        root = (2 * _pi()).sqrt()
        for octave in range(_OCTAVES):
            width = Decimal(2) ** (octave - _PIECE_BITS - 54)
            for place in range(1 << _PIECE_BITS):
                p = width * (2**_PIECE_BITS + place + Decimal("0.5"))
                z = Decimal(-normal.inv_cdf(float(p)))
                density = (-z * z / 2).exp() / root
                # Newton's step on the tail's probability: its error is the square of fp64's, about 1e-30.
                step = (_upper_tail(z, density) - p) / density
                z += step
                density *= 1 - step * z  # to first order, which leaves 1e-30 too
                slope = -width / density
                curvature, third = z * slope * slope / 2, (1 + 2 * z * z) * slope**3 / 6
                rows.append((float(z), float(slope), float(curvature), float(third)))
    return rows


def _upper_tail(z: Decimal, density: Decimal) -> Decimal:
    """Return 1/2 - phi(z) (z + z^3/3 + z^5/(3 5) + ...), with an error below 1e-39."""
    term = total = z
    square, smallest = z * z, Decimal("1e-40") / density
    n = 1
    while term > smallest:
        n += 2
        term *= square / n
        total += term
    return Decimal("0.5") - density * total


def _pi() -> Decimal:
    """Return pi by Machin's formula, to the context's precision."""

    def arctan_of_inverse(x: int) -> Decimal:
        power = total = 1 / Decimal(x)
        n, sign = 1, 1
        while power > Decimal("1e-50"):
            power /= x * x
            n, sign = n + 2, -sign
            total += sign * power / n
        return total

    return 16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)
