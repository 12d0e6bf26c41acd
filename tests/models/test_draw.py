"""Numbers by index: right to a hundredth of fp32's rounding, normal, and the same bits however they are asked for."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from megamult.models.common import draw

MASK = (1 << 64) - 1
ACCURACY = 5e-10
"""Largest error of z before it is rounded to fp32, as the module states it."""


RECORDED = [
    "-0x1.2fc31e0000000p+0",
    "0x1.c017c60000000p-1",
    "0x1.70e9f20000000p-6",
    "0x1.d600580000000p-2",
    "-0x1.dbacfc0000000p-2",
    "-0x1.8a7c040000000p-2",
]
RECORDED_FAR = ["-0x1.51e1ce0000000p-5", "-0x1.90d8c40000000p-1"]


def whole(rows: int, columns: int, *, seed: int = 1, name: str = "w", dtype: torch.dtype = torch.float32) -> Tensor:
    matrix = torch.full((rows, columns), math.nan, dtype=dtype)
    draw.fill_normal(matrix, 1.0, draw.key(seed, name), 0, 0, columns)
    return matrix


def random_bits(key: int, index: int) -> int:
    """SplitMix64 as its authors print it: output `index` of a generator that is seeded with `key`."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def quantile(bits: int) -> float:
    """Of the upper tail, in fp64: the probability is the odd number of 53 bits, the lowest bit the sign."""
    p = (((bits >> 11) & ((1 << 53) - 2)) | 1) * 2.0**-54
    return -NormalDist().inv_cdf(p) * (-1 if bits & 1 else 1)


def test_the_generator_is_splitmix64() -> None:
    # The first outputs for the seed 1234567, as in the generator's published test vectors.
    states = torch.tensor([draw._signed(1234567 + (i + 1) * draw._GOLDEN) for i in range(3)])
    assert [value & MASK for value in draw._mixed(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_an_element_is_the_normal_quantile_of_its_index() -> None:
    key = draw.key(7, "decoder.weight")
    matrix = torch.empty(40, 50, dtype=torch.float64)
    draw.fill_normal(matrix, 0.5, key, 3, 10, 90)
    for row in range(40):
        for col in range(50):
            want = 0.5 * quantile(random_bits(key, (row + 3) * 90 + col + 10))
            # Half a unit in the last place of fp32 beside the quantile's own error.
            assert abs(matrix[row, col].item() - want) <= ACCURACY + abs(want) * 2**-24


def test_an_element_of_another_distribution_is_its_quantile_at_a_uniform_number() -> None:
    key = draw.key(7, "mixer.A_log")
    vector = torch.empty(60, 1)
    draw.fill_by_quantile(vector, lambda u: (1 + 15 * u).log(), key, 4, 0, 1)
    for row in range(60):
        u = ((random_bits(key, row + 4) >> 11) + 0.5) * 2.0**-53
        # Two roundings of fp64 and one of fp32, of numbers up to log 16.
        assert abs(vector[row, 0].item() - math.log(1 + 15 * u)) <= 2 * 2**-24


def test_the_quantile_is_accurate_in_every_piece_of_every_octave() -> None:
    """At both ends and in the middle of each piece, where a cubic is worst and best."""
    tails = []
    for octave in range(53):
        for place in range(64):
            begin = ((64 + place) << octave) >> 6
            end = ((65 + place) << octave) >> 6
            tails += [begin | 1, ((begin + end) // 2) | 1, max(begin, end - 1) | 1]
    bits = torch.tensor([draw._signed((tail >> 1) << 12) for tail in tails])
    got = draw._normal(bits)
    want = torch.tensor([quantile(int(each) & MASK) for each in bits.tolist()], dtype=torch.float64)
    assert (got - want).abs().max().item() < ACCURACY
    assert torch.equal(draw._normal(bits | 1), -got)
    assert 8.2 < got.max().item() < 8.3 and abs(got.min().item()) < ACCURACY


def test_a_part_has_the_bits_that_it_has_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = whole(70, 300)
    key = draw.key(1, "w")
    for block in (1 << 14, 64, 7):
        monkeypatch.setitem(draw._BLOCK, "cpu", block)
        for top, left, height, width in ((0, 0, 70, 300), (13, 0, 31, 300), (5, 100, 60, 150), (69, 299, 1, 1)):
            part = torch.empty(height, width)
            draw.fill_normal(part, 1.0, key, top, left, 300)
            assert torch.equal(part, matrix[top : top + height, left : left + width])
            inside = torch.zeros(height, width + 3)
            draw.fill_normal(inside[:, 1 : width + 1], 1.0, key, top, left, 300)
            assert torch.equal(inside[:, 1 : width + 1], part) and (inside[:, width + 1 :] == 0).all()


def test_other_dtypes_are_cast_from_fp32_and_names_and_seeds_give_other_numbers() -> None:
    matrix = whole(64, 64)
    assert torch.equal(whole(64, 64, dtype=torch.bfloat16), matrix.bfloat16())
    assert torch.equal(whole(64, 64, dtype=torch.float64), matrix.double())
    for other in (whole(64, 64, name="v"), whole(64, 64, seed=2)):
        assert (other == matrix).sum().item() == 0


def test_bits_are_the_same_on_every_machine_and_in_every_version() -> None:
    """Recorded once. What changes them changes every new run's initial weights."""
    assert [value.hex() for value in whole(1, 6)[0].tolist()] == RECORDED
    # Any index up to 2^63 is a place: beyond 2^32, where 32-bit arithmetic would repeat.
    far = torch.empty(1, 2)
    draw.fill_normal(far, 1.0, draw.key(1, "w"), 2**31, 2**20, 2**31)
    assert [value.hex() for value in far[0].tolist()] == RECORDED_FAR


def test_numbers_are_normal_and_independent() -> None:
    """2^22 numbers; every threshold is five standard errors, which a right generator misses once in 2 million."""
    n = 1 << 22
    x = whole(2048, 2048).double().view(-1)
    assert abs(x.mean().item()) < 5 / math.sqrt(n)
    assert abs(x.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean().item()) < 5 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov and Smirnov: P(sqrt(n) D > 2.73) = 2 exp(-2 2.73^2) = 7e-7.
    cdf = 0.5 * torch.erfc(-x.sort().values / math.sqrt(2))
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max((steps - cdf).max().item(), (cdf - steps + 1 / n).max().item())
    assert distance * math.sqrt(n) < 2.73
    # Far tails: beyond 4, 63 in a million; the count is Poisson.
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs((x.abs() > 4).sum().item() - expected) < 5 * math.sqrt(expected)
    # Neighbours in a row and in a column, other tensors and other seeds.
    pairs = [(x[:-1], x[1:]), (x[:-2048], x[2048:])]
    pairs += [(x, other.double().view(-1)) for other in (whole(2048, 2048, name="v"), whole(2048, 2048, seed=2))]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(len(a))
        # Magnitudes too: the squares have variance 2.
        assert abs(((a.square() - 1) * (b.square() - 1)).mean().item()) < 5 * 2 / math.sqrt(len(a))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_bits_of_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        part = torch.empty(1000, 3000, dtype=dtype, device="cuda")
        draw.fill_normal(part, 0.02, draw.key(1, "w"), 5, 1000, 8000)
        here = torch.empty(1000, 3000, dtype=dtype)
        draw.fill_normal(here, 0.02, draw.key(1, "w"), 5, 1000, 8000)
        assert torch.equal(part.cpu(), here)
