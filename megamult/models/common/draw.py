"""Random numbers that depend only on the seed, the name of a tensor and the index i of an element.

A number is the inverse of a distribution function, applied to output i of the generator SplitMix64 with a key that is a
hash of seed and name. A rank therefore draws only the elements that it holds, in any order, and every sharding and
device gives the same model, bit by bit.

For normal numbers, equal bits need care. The computation uses integers, and additions, subtractions and multiplications
in fp64, for which IEEE 754 prescribes the rounding. Each of these is a tensor operation of its own. A compiler must not
fuse two of them, because a fused multiply-add rounds only once. Transcendental functions are not rounded in the same
way by all libraries; they occur only in a table whose values are computed in decimal arithmetic.

One bit of the generator's output gives the sign of the number, and 52 bits give p, between 2^-54 and 1/2. The absolute
value of the number is z(p), which a normal random number exceeds with probability p (the upper tail). Each octave of p
is divided into 64 equal pieces, and on each piece a cubic polynomial approximates z. The absolute error is below 5e-10;
rounding a number near 1 to fp32 has an error a hundred times as large. All numbers are between -8.3 and 8.3. Source of
the generator: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PIECE_BITS = 6
"""Base-2 logarithm of the number of pieces of an octave."""
_OCTAVES = 53
_BLOCK = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Largest number of elements that are drawn at once. On a CPU they fit into the cache. On a GPU there are so many that
few kernels are needed."""


def key(seed: int, name: str) -> int:
    """Return the 64-bit key of the tensor `name` under `seed`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@torch.no_grad()
def fill_normal(target: Tensor, std: float, key: int, row: int, col: int, columns: int) -> None:
    """Fill a rectangle of a matrix with the random numbers of its elements, which are drawn from N(0, std^2).

    Args:
        target: [height, width] rectangle to fill, in any dtype. Numbers are rounded to fp32, then to this dtype.
        std: standard deviation.
        key: key of the matrix (:func:`key`).
        row, col: position of the rectangle's first element in the matrix.
        columns: number of columns of the whole matrix, in which element (r, c) has index r * columns + c.
    """
    _fill(target, lambda bits: _normal(bits).mul_(std), key, row, col, columns)


@torch.no_grad()
def fill_by_quantile(
    target: Tensor, quantile: Callable[[Tensor], Tensor], key: int, row: int, col: int, columns: int
) -> None:
    """Fill a rectangle with random numbers whose distribution is given by its quantile function.

    Args:
        target, key, row, col, columns: the same as for :func:`fill_normal`.
        quantile: elementwise function from u in (0, 1), in fp64, to the number that a random number of the
            distribution is below with probability u. It gets uniformly distributed u.
    """
    # The 53 highest bits, and half a unit, so that u is neither 0 nor 1.
    _fill(
        target,
        lambda bits: quantile(_shifted(bits, 11).to(torch.float64).add_(0.5).mul_(2.0**-53)),
        key,
        row,
        col,
        columns,
    )


def _fill(target: Tensor, numbers: Callable[[Tensor], Tensor], key: int, row: int, col: int, columns: int) -> None:
    """Fill a rectangle with `numbers(bits)`, where `bits` are the generator's 64 bits for each element."""
    height, width = target.shape
    block = _BLOCK[target.device.type]
    # If the rectangle consists of whole rows, its indices are consecutive, and it is drawn as one long row.
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
            piece.copy_(numbers(_mixed(state)).to(torch.float32))


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the same low 64 bits as `value`; torch's int64 is signed."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros. torch's own shift fills with the sign bit."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(state: Tensor) -> Tensor:
    """Turn each state into SplitMix64's output, in place."""
    state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(_FIRST))
    state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(_SECOND))
    return state.bitwise_xor_(_shifted(state, 31))


def _normal(bits: Tensor) -> Tensor:
    """Return normal fp64 numbers, each from 64 random bits.

    The highest 52 bits give the probability of the tail; the lowest bit gives the sign.
    """
    tail = (bits >> 11).bitwise_and_((1 << 53) - 2).bitwise_or_(1)  # 2^54 times the probability: odd, in [1, 2^53)
    magnitude = tail.to(torch.float64).view(torch.int64)
    piece = (magnitude >> (52 - _PIECE_BITS)).sub_(1023 << _PIECE_BITS)
    # The rest of the mantissa gives t, the distance from the middle of the piece, in widths of the piece: [-1/2, 1/2).
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
    """Return the polynomials' coefficients on `device`: four tensors [pieces], from the constant to the cubic."""
    # NumPy makes the table, because under `deepspeed.zero.Init` the tensors that torch.tensor and similar functions
    # return have the model's dtype.
    columns = torch.from_numpy(np.array(_coefficients()).T.copy())
    return tuple(column.to(device) for column in columns)


@lru_cache(maxsize=1)
def _coefficients() -> list[tuple[float, ...]]:
    """Return the coefficients of the cubic polynomial of each piece.

    z(p) is the number that a normal random number exceeds with probability p. The coefficients are those of the Taylor
    series of z about the middle of the piece. With the density phi, z' = -1 / phi(z), z'' = z z'^2 and
    z''' = (1 + 2 z^2) z'^3. The fp64 value of z is corrected in decimal arithmetic, so that the rounded coefficients
    are equal on all machines.
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
                # One Newton step on the probability of the tail. It squares the error of fp64, to about 1e-30.
                step = (_upper_tail(z, density) - p) / density
                z += step
                density *= 1 - step * z  # to first order; the error is about 1e-30 too
                slope = -width / density
                curvature, third = z * slope * slope / 2, (1 + 2 * z * z) * slope**3 / 6
                rows.append((float(z), float(slope), float(curvature), float(third)))
    return rows


def _upper_tail(z: Decimal, density: Decimal) -> Decimal:
    """Return the probability that a normal random number exceeds z, with an error below 1e-39.

    The probability is 1/2 - phi(z) (z + z^3/3 + z^5/(3 * 5) + z^7/(3 * 5 * 7) + ...).

    Args:
        z: number that is exceeded, not negative.
        density: phi(z).
    """
    term = total = z
    square, smallest = z * z, Decimal("1e-40") / density
    n = 1
    while term > smallest:
        n += 2
        term *= square / n
        total += term
    return Decimal("0.5") - density * total


def _pi() -> Decimal:
    """Return pi to the precision of the decimal context, by Machin's formula."""

    def arctan_of_inverse(x: int) -> Decimal:
        power = total = 1 / Decimal(x)
        n, sign = 1, 1
        while power > Decimal("1e-50"):
            power /= x * x
            n, sign = n + 2, -sign
            total += sign * power / n
        return total

    return 16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)
