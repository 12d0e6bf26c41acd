"""Scaling a local weight, forward and backward, agrees with the float64 reference on every path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megamult.multipliers import kernels
from megamult.multipliers.kernels import Span
from megamult.multipliers.reference import effective_weight, gradients

ROWS, COLS = 600, 230  # three of the CPU path's blocks of 2^16 elements, the last cut short; no powers of two

SPANS: dict[str, tuple[Span, ...]] = {
    "one matrix": (Span(0, ROWS, 0),),
    "fused, interleaved": (Span(0, 300, 0), Span(300, 350, 1), Span(350, 400, 2), Span(400, 550, 0), Span(550, 600, 1)),
    "some without columns": (Span(0, 250, None), Span(250, 270, 1), Span(270, 600, 0)),
}
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compiles kernels for a CUDA GPU, and there is none"
)
RHO_KAPPA = [(True, False), (False, True), (True, True)]


class Backward(NamedTuple):
    """What `scale_backward` leaves in the gradient [out, in], and returns."""

    weight: Tensor
    row_dot: Tensor | None
    col: Tensor | None


@dataclass(frozen=True)
class Problem:
    """Operands of both functions in `dtype`."""

    weight: Tensor
    grad: Tensor
    rho: Tensor | None
    kappa: Tensor | None
    spans: tuple[Span, ...]

    @staticmethod
    def draw(spans: tuple[Span, ...], rho: bool, kappa: bool, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Normal operands; a multiplier of each kind is exactly zero."""
        torch.manual_seed(0)
        vectors = max((span.col for span in spans if span.col is not None), default=0) + 1
        made = [torch.randn(shape) for shape in ((ROWS, COLS), (ROWS, COLS), (ROWS,), (vectors, COLS))]
        made[2][1] = 0.0
        made[3][:, 1] = 0.0
        weight, grad, r, c = (tensor.to(device, dtype) for tensor in made)
        if not kappa:
            spans = tuple(Span(span.start, span.stop, None) for span in spans)
        return Problem(weight, grad, r if rho else None, c if kappa else None, spans)

    def reference(self, magnitudes: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(W_eff, dL/dW, row dots, dL/dkappa) in float64; with `magnitudes`, of all operands' absolute values."""

        def exact(tensor: Tensor | None) -> Tensor | None:
            wide = None if tensor is None else tensor.double().cpu()
            return wide.abs() if magnitudes and wide is not None else wide

        weight, grad, rho, kappa = (exact(t) for t in (self.weight, self.grad, self.rho, self.kappa))
        assert weight is not None and grad is not None
        effective, grad_weight = torch.empty_like(weight), torch.empty_like(weight)
        row_dot, grad_kappa = torch.empty(ROWS, dtype=torch.float64), None if kappa is None else torch.zeros_like(kappa)
        for span in self.spans:
            rows = slice(span.start, span.stop)
            r = None if rho is None else rho[rows]
            c = None if kappa is None or span.col is None else kappa[span.col]
            effective[rows] = effective_weight(weight[rows], r, c)
            back = gradients(grad[rows], weight[rows], r, c)
            grad_weight[rows], row_dot[rows] = back.weight, back.row
            if c is not None:
                grad_kappa[span.col] += back.col
        return effective, grad_weight, row_dot, grad_kappa


def assert_agrees(problem: Problem, effective: Tensor, back: Backward) -> None:
    """Each result is within a few roundings of its operands' dtype, relative to the sum of its |terms|.

    A term has up to two products, each rounded once; a sum is rounded when a block's is stored and when blocks are
    joined: 4 halves of the dtype's epsilon u bound them. Accumulation itself happens in fp32: at most 600 terms, whose
    roundings grow as the square root of their number: another 25 halves of the epsilon of fp32.
    """
    tolerance = 4 * torch.finfo(problem.weight.dtype).eps / 2 + 25 * 2**-24
    wanted, magnitudes = problem.reference(), problem.reference(magnitudes=True)
    results = (effective, back.weight, back.row_dot, back.col)
    for name, got, want, scale in zip(("W_eff", "dW", "row_dot", "dkappa"), results, wanted, magnitudes, strict=True):
        if want is None or scale is None:
            assert got is None, name
        elif got is not None:
            excess = ((got.double().cpu() - want).abs() - tolerance * scale).max().item()
            assert excess <= 0, f"{name} is {excess:.3e} beyond {tolerance:.1e} of the sum of its terms' magnitudes"


def run_cpu(problem: Problem, needs_row_dot: bool = True, piece: bool = False) -> tuple[Tensor, Backward]:
    """Both public functions; what they overwrite is theirs, so they get copies."""
    p = problem
    factors = p.rho, p.kappa, p.spans
    effective = kernels.scale(p.weight.clone() if piece else p.weight, *factors, piece=piece)
    grad = p.grad.clone()
    sums = kernels.scale_backward(grad, p.weight, *factors, row=needs_row_dot, col=p.kappa is not None, piece=piece)
    return effective, Backward(grad, *sums)


def run_compiled_eagerly(problem: Problem, needs_row_dot: bool = True, piece: bool = False) -> tuple[Tensor, Backward]:
    """The functions that CUDA compiles, run by Python on the CPU."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(kernels, "_compiled", lambda *_: True)
        return run_cpu(problem, needs_row_dot, piece)


@pytest.fixture(autouse=True)
def several_blocks_and_no_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has torch's whole limit of compilations, after which functions would silently run uncompiled; and the
    CPU's blocks are small enough for several."""
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", 1 << 16)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


Run = Callable[..., tuple[Tensor, Backward]]
every_problem = [
    pytest.param(name, rho, kappa, dtype, id=f"{name}-{'rho' * rho}-{'kappa' * kappa}-{dtype}")
    for (name, (rho, kappa)), dtype in itertools.product(
        itertools.product(SPANS, RHO_KAPPA), (torch.float32, torch.bfloat16)
    )
]


@pytest.mark.parametrize("run", [run_cpu, run_compiled_eagerly])
@pytest.mark.parametrize(("spans", "rho", "kappa", "dtype"), every_problem)
def test_scaling_and_its_gradients_are_the_float64_reference(
    run: Run, spans: str, rho: bool, kappa: bool, dtype: torch.dtype
) -> None:
    problem = Problem.draw(SPANS[spans], rho, kappa, dtype)
    effective, back = run(problem)
    assert effective.dtype == back.weight.dtype == dtype
    assert back.row_dot is not None
    assert back.row_dot.dtype == torch.float32  # multipliers' gradients are rounded once, by the layer
    assert_agrees(problem, effective, back)


@pytest.mark.parametrize(("rho", "kappa"), RHO_KAPPA)
@pytest.mark.parametrize("spans", SPANS)
def test_a_bf16_weight_is_scaled_by_fp32_factors_and_rounded_once(spans: str, rho: bool, kappa: bool) -> None:
    drawn, factors = (Problem.draw(SPANS[spans], rho, kappa, dtype) for dtype in (torch.bfloat16, torch.float32))
    problem = Problem(drawn.weight, drawn.grad, factors.rho, factors.kappa, drawn.spans)
    effective, back = run_cpu(problem)
    wanted, magnitudes = problem.reference(), problem.reference(magnitudes=True)
    for got, want in ((effective, wanted[0]), (back.weight, wanted[1])):
        assert got.dtype == torch.bfloat16
        # Half of bf16's epsilon, and two fp32 products before it.
        torch.testing.assert_close(got.double(), want, rtol=2**-8 + 2 * 2**-24, atol=0)
    # fp32 sums of at most 600 terms, whose roundings grow as the square root of their number.
    for sums, want, scale in zip((back.row_dot, back.col), wanted[2:], magnitudes[2:], strict=True):
        assert (sums is None) == (want is None)
        if sums is not None and want is not None and scale is not None:
            assert bool(((sums.double() - want).abs() <= 25 * 2**-24 * scale).all())


@pytest.mark.parametrize("run", [run_cpu, run_compiled_eagerly])
def test_row_sums_that_nobody_asked_for_are_left_out(run: Run) -> None:
    problem = Problem.draw(SPANS["one matrix"], rho=False, kappa=True, dtype=torch.float32)
    effective, back = run(problem, needs_row_dot=False)
    assert back.row_dot is None
    assert_agrees(problem, effective, back)


@pytest.mark.parametrize("run", [run_cpu, run_compiled_eagerly])
def test_ones_leave_a_bf16_weight_and_its_gradient_bitwise_alone(run: Run) -> None:
    drawn = Problem.draw(SPANS["fused, interleaved"], rho=True, kappa=True, dtype=torch.bfloat16)
    assert drawn.rho is not None and drawn.kappa is not None
    rho, kappa = torch.ones_like(drawn.rho), torch.ones_like(drawn.kappa)
    problem = Problem(drawn.weight, drawn.grad, rho, kappa, drawn.spans)
    effective, back = run(problem)
    assert torch.equal(effective, problem.weight)
    assert torch.equal(back.weight, problem.grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rho", "kappa"), [*RHO_KAPPA, (False, False)])
@pytest.mark.parametrize("spans", SPANS)
def test_rows_are_scaled_in_place_as_the_reference_says(spans: str, rho: bool, kappa: bool, compiled: bool) -> None:
    problem = Problem.draw(SPANS[spans], rho, kappa, torch.float32)
    assert_agrees(problem, *(run_compiled_eagerly if compiled else run_cpu)(problem, piece=True))


# Of one buffer that holds them one after the other: rows, columns. Square and not, narrower than high, the first again.
PIECES = ((40, 40), (300, 40), (40, 300), (7, 40), (64, 64), (40, 40), (1, 30))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_few_compilations_serve_pieces_of_every_shape_wherever_they_lie_in_a_buffer(device: str) -> None:
    # What follows of sizes, strides and offsets is the same for every backend, and this one compiles in no time.
    backend = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    scale, backward = (
        torch.compile(function, dynamic=True, backend=backend)
        for function in (kernels._scale_piece, kernels._backward_piece)
    )
    torch.manual_seed(0)
    size = sum(rows * cols for rows, cols in PIECES)
    weights, grads, scaled = (torch.randn(size, device=device) for _ in range(3))
    wanted_scaled, wanted_grads, first = scaled.double(), grads.double(), 0
    with torch.no_grad():
        for rows, cols in PIECES:
            here = slice(first, first + rows * cols)
            first += rows * cols
            rho, kappa = torch.randn(rows, device=device), torch.randn(cols, device=device)
            g, w = (whole[here].view(rows, cols) for whole in (wanted_grads, weights.double()))
            wanted = gradients(g, w, rho.double(), kappa.double())
            wanted_grads[here] = wanted.weight.flatten()
            effective = effective_weight(wanted_scaled[here].view(rows, cols), rho.double(), kappa.double())
            wanted_scaled[here] = effective.flatten()
            # The matrix and up to two of no rows.
            kappas = torch.cat([kappa[None], torch.ones(rows % 3, cols, device=device)])
            factors = kernels._whole(weights[here].view(rows, cols), rho, kappas, (Span(0, rows, 0),))
            scale(scaled[here].view(rows, cols), *factors)
            row, products = backward(grads[here].view(rows, cols), weights[here].view(rows, cols), *factors)
            col = products.sum(0)
            # Sums of up to 300 fp32 products of some size 1.
            torch.testing.assert_close(row.double(), wanted.row, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(col.double(), wanted.col, rtol=1e-5, atol=1e-4)
    # Two products, each rounded once.
    torch.testing.assert_close(scaled.double(), wanted_scaled, rtol=3e-7, atol=0)
    torch.testing.assert_close(grads.double(), wanted_grads, rtol=3e-7, atol=0)
    # Square or not, at the start of the buffer or not: far from the limit, after which nothing is compiled.
    assert backend.frame_count <= 2 * 4, backend.frame_count
    assert torch._dynamo.config.recompile_limit >= 8


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize(("rho", "kappa"), [*RHO_KAPPA, (False, False)])
@pytest.mark.parametrize("spans", SPANS)
def test_the_compiled_kernels_in_place_are_the_float64_reference(spans: str, rho: bool, kappa: bool) -> None:
    problem = Problem.draw(SPANS[spans], rho, kappa, torch.float32, device="cuda")
    assert kernels._compiled(problem.weight, problem.spans, piece=True)
    assert_agrees(problem, *run_cpu(problem, piece=True))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize(("spans", "rho", "kappa", "dtype"), every_problem)
def test_the_compiled_kernels_are_the_float64_reference(spans: str, rho: bool, kappa: bool, dtype: torch.dtype) -> None:
    problem = Problem.draw(SPANS[spans], rho, kappa, dtype, device="cuda")
    assert_agrees(problem, *run_cpu(problem))
