"""Products with a symmetric result: torch's block rows; the Triton kernel, interpreted and compiled without a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmarks import kernel_resources
from megamult.optim.muon import newton_schulz, symmetric
from megamult.optim.muon.coefficients import coefficients
from megamult.optim.muon.newton_schulz import Form, orthogonalize
from tests.optim.muon.test_newton_schulz import reference

TILE = 128  # symmetric_triton.TILE, of a module that not every machine can import

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'megamult[test]'"
)


def operands(n: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X[2, n, depth] and a symmetric C[2, n, n]."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, depth, generator=generator).to(dtype)
    c = torch.randn(2, n, n, generator=generator).to(dtype)
    return x, c + c.mT


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("products", ["whole", "block_rows"])
@pytest.mark.parametrize("n", [1, 50, 64, 130, 256, 300])
def test_a_product_is_written_to_its_place(n: int, products: symmetric.Products, batch: int) -> None:
    x, r = (t[:batch].double() for t in operands(n, 70, torch.float32))
    out = torch.full_like(r, torch.nan)
    assert symmetric.symmetric_product(x, x.mT, out, products) is out
    torch.testing.assert_close(out, x @ x.mT)
    if products == "block_rows":
        corner = n // 4 if n >= 256 else 0
        assert torch.equal(out[:, :corner, n - corner :], out[:, n - corner :, :corner].mT), "mirrored"
    symmetric.symmetric_product(r, r, out, products, add=(0.3, r), alpha=-0.7)
    torch.testing.assert_close(out, 0.3 * r - 0.7 * r @ r)
    symmetric.symmetric_product(r, r, out, products, alpha=-0.7)
    torch.testing.assert_close(out, -0.7 * r @ r)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_rows_in_half_precision_are_rounded_once(dtype: torch.dtype, batch: int) -> None:
    x, _ = (t[:batch] for t in operands(300, 130, dtype))
    out = torch.full((batch, 300, 300), torch.nan, dtype=dtype)
    symmetric.symmetric_product(x, x.mT, out, "block_rows")
    # Sums are fp32: their error is far below the one rounding of the result.
    product = x.double() @ x.double().mT
    torch.testing.assert_close(out.double(), product, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton's interpreter runs kernels on the CPU: that is settled where Triton is imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            executor.submit(os.getpid).result()  # starts the process
        yield executor


def lower_tiles(left: Tensor, right: Tensor, add: Tensor | None, beta: float, alpha: float) -> tuple[Tensor, int]:
    """The kernel's result and the FLOPs that torch counts; for the interpreter's process."""
    from megamult.optim.muon import symmetric_triton

    out = torch.full((len(left), left.shape[1], right.shape[2]), torch.nan, dtype=left.dtype)
    with FlopCounterMode(display=False) as counter:
        symmetric_triton.lower_tiles(left, right, out, add, beta, alpha)
    return out, counter.get_total_flops()


@needs_triton
@pytest.mark.parametrize("depth", [7, 64, 150])
@pytest.mark.parametrize("n", [1, 128, 130, 300])
def test_the_kernel_computes_the_product(interpreter: Executor, n: int, depth: int) -> None:
    # fp16: the interpreter, which computes with NumPy, has no bf16. Sums are fp32, the result is rounded once, 2^-11.
    x, c = operands(n, depth, torch.float16)
    product = x.double() @ x.double().mT
    for add, beta, alpha in ((c, 0.3, -0.7), (None, 0.0, 1.0)):
        actual, _ = interpreter.submit(lower_tiles, x, x.mT, add, beta, alpha).result()
        expected = alpha * product if add is None else beta * add.double() + alpha * product
        torch.testing.assert_close(actual.double(), expected, rtol=2**-11, atol=1e-4)


@needs_triton
def test_the_kernel_computes_the_lower_tiles_and_mirrors_them(interpreter: Executor) -> None:
    """Operands whose product is not symmetric show which half was computed, tile by tile. More tile rows than a group
    has."""
    n = 9 * TILE + 1
    left, right = operands(n, 4, torch.float32)[0], operands(n, 4, torch.float32)[0].mT * 2 + 1
    actual, _ = interpreter.submit(lower_tiles, left, right, None, 0.0, 1.0).result()
    full, tile = left @ right, torch.arange(n) // TILE
    torch.testing.assert_close(actual, torch.where(tile[:, None] >= tile[None, :], full, full.mT))


@needs_triton
@pytest.mark.parametrize("n", [100, 512, 700])
def test_the_kernels_flops_are_counted(interpreter: Executor, n: int) -> None:
    x, _ = operands(n, 16, torch.float16)
    _, flops = interpreter.submit(lower_tiles, x, x.mT, None, 0.0, 1.0).result()
    side = -(-n // TILE)
    assert flops == 2 * 2 * 16 * TILE**2 * sum(range(1, side + 1))


def through_the_kernel(given: Tensor, form: Form) -> tuple[Tensor, int]:
    """Five steps as on a GPU, and how often the kernel ran; for the interpreter's process."""
    from megamult.optim.muon import symmetric_triton

    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        symmetric_triton.lower_tiles(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "lower_tiles", counted, raising=False)
        patch.setattr(newton_schulz, "has_kernel", lambda device: True)
        patch.setattr(symmetric, "_FEWEST_ROWS", 129)
        return orthogonalize(given, coefficients("simple", 5), torch.float16, form), len(calls)


@needs_triton
@pytest.mark.parametrize(("form", "products"), [("standard", 10), ("gram", 16)])
def test_newton_schulz_through_the_kernel_is_newton_schulz(interpreter: Executor, form: Form, products: int) -> None:
    given = torch.randn(144, 320, generator=torch.Generator().manual_seed(0))
    actual, calls = interpreter.submit(through_the_kernel, given, form).result()
    expected = reference(given, coefficients("simple", 5))
    assert calls == products  # gram: R made twice, and R^2, ZQ, ZR, ZRZ where they are needed
    tall, calls = interpreter.submit(through_the_kernel, given.mT, form).result()
    assert calls == products
    assert torch.linalg.vector_norm(tall.mT.double() - expected) < 20 * 2**-11 * torch.linalg.vector_norm(expected)
    # As in half precision by torch's products (test_newton_schulz.py): a few roundings per step, ten products deep.
    assert torch.linalg.vector_norm(actual.double() - expected) < 20 * 2**-11 * torch.linalg.vector_norm(expected)
    # A shape that does not suit it is torch's.
    assert interpreter.submit(through_the_kernel, given[:, :-1], form).result()[1] == 0


@needs_triton
def test_operands_that_do_not_fit_are_an_error(interpreter: Executor) -> None:
    x, c = operands(20, 30, torch.float16)
    for right, add in ((x, None), (x.mT[:, :, :10], None), (x.mT, c[:1])):
        with pytest.raises(ValueError, match=r"\(2, 20, 30\).*must be \[b, n, k\]"):
            interpreter.submit(lower_tiles, x, right, add, 1.0, 1.0).result()


@needs_triton
@pytest.mark.parametrize(("dtype", "product"), [("bf16", "R^2 + R"), ("fp16", "X X^T"), ("bf16", "X^T X")])
@pytest.mark.parametrize("capability", kernel_resources.GPUS)
def test_for_sizes_that_it_is_chosen_for_the_kernel_compiles_to_matrix_instructions_without_spills(
    capability: int, dtype: str, product: str
) -> None:
    made = kernel_resources.compiled(capability, dtype, product)
    instruction, memory, _ = kernel_resources.GPUS[capability]
    assert re.search(instruction, made.ptx)
    assert made.shared <= memory * 1024
    assert "cp.async" in made.ptx, "loads do not overlap with products"
    assert made.spilled == 0, "registers are spilled"
    # A block has 256 threads, and a multiprocessor 65,536 registers: above 255 no thread can have more.
    assert 0 < made.registers <= 255
