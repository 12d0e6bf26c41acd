"""The same runs on GPUs: what the CPU cannot show of placement, NCCL, fused and compiled kernels."""

from __future__ import annotations

import pytest
import torch

from tests.invariance import Case, Outcome, run_cases
from tests.processes import run_distributed

pytestmark = pytest.mark.gpu

# fp32 without TF32 on both sides; GPU kernels sum in other orders and their exp and rsqrt differ in the last bits,
# some 1e-6 relative per step on a loss. What a wrong placement does is above 1e-3.
RELATIVE = 1e-4


def _agree(cases: list[Case], outcomes: list[Outcome], references: list[Outcome]) -> None:
    for case, outcome, reference in zip(cases, outcomes, references, strict=True):
        for key in ("loss", "grad_norm", "multiplier_grad_norm"):
            expected = [record[key] for record in reference.records[:5]]
            assert [record[key] for record in outcome.records[:5]] == pytest.approx(expected, rel=RELATIVE), (case, key)


def _needs(gpus: int) -> pytest.MarkDecorator:
    found = torch.cuda.device_count()
    return pytest.mark.skipif(found < gpus, reason=f"needs {gpus} CUDA GPUs, {found} found")


@_needs(1)
def test_one_gpu_trains_as_the_cpu_does_under_every_zero_stage() -> None:
    cases = [
        *(Case(zero=stage) for stage in range(4)),
        Case(zero=1, placement="mapping", recompute=True),
        Case(zero=3, placement="scalar", accumulation=3),
        *(Case(zero=stage, optimizer="muon", implementation=("layer", "folded")[stage % 2]) for stage in range(4)),
    ]
    references = run_distributed(1, run_cases, [case.reference for case in cases])[0]
    _agree(cases, run_distributed(1, run_cases, cases, cuda=True)[0], references)


@_needs(2)
def test_two_gpus_train_as_the_cpu_does() -> None:
    cases = [
        Case(world=2, tensor=2, zero=1),
        Case(world=2, tensor=2, zero=2, sequence=True),
        Case(world=2, tensor=2, zero=3, sequence=True, recompute=True),
        Case(world=2, zero=2, accumulation=3),
        *(Case(world=2, zero=stage, optimizer="muon") for stage in range(4)),
        Case(world=2, tensor=2, zero=1, optimizer="muon"),
    ]
    references = run_distributed(1, run_cases, [case.reference for case in cases])[0]
    _agree(cases, run_distributed(2, run_cases, cases, cuda=True)[0], references)


@_needs(1)
@pytest.mark.parametrize("shape", [(512, 1408), (1408, 512), (1024, 1024)])
def test_every_method_of_newton_schulz_is_the_polynomial_and_one_is_chosen(shape: tuple[int, int]) -> None:
    from megamult.optim.muon import timing
    from megamult.optim.muon.coefficients import coefficients
    from megamult.optim.muon.newton_schulz import orthogonalize_by
    from tests.optim.muon.test_newton_schulz import reference

    steps, device = coefficients("simple", 5), torch.device("cuda")
    matrices = torch.randn(2, *shape, device=device)
    expected = torch.stack([reference(each, steps) for each in matrices.cpu()]).to(device)
    candidates = timing.methods(shape, [torch.bfloat16], kernel=True)
    assert {each.products for each in candidates} == {"whole", "block_rows", "kernel"}
    for method in candidates:
        actual = orthogonalize_by(matrices, steps, method)
        # As in tests/optim/muon/test_newton_schulz.py: a few roundings per step, ten products deep.
        error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
        assert error < 20 * 2**-9, method
    assert timing.fastest(shape, steps, candidates, device).method in candidates


@_needs(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "depth"), [(130, 70), (512, 1408), (1100, 333)])
def test_the_symmetric_kernel_computes_the_product(n: int, depth: int, dtype: torch.dtype) -> None:
    from megamult.optim.muon.symmetric_triton import lower_tiles

    x = torch.randn(3, n, depth, device="cuda").to(dtype)
    c = torch.randn(3, n, n, device="cuda").to(dtype)
    c = c + c.mT
    product = x.double() @ x.double().mT
    # Sums are fp32: their error is far below the one rounding of the result.
    rounding = torch.finfo(dtype).eps
    actual = torch.full_like(c, torch.nan)
    lower_tiles(x, x.mT, actual, None, 0.0, 1.0)
    torch.testing.assert_close(actual.double(), product, rtol=rounding, atol=1e-3)
    lower_tiles(x, x.mT, actual, c, 0.3, -0.7)
    torch.testing.assert_close(actual.double(), 0.3 * c.double() - 0.7 * product, rtol=rounding, atol=1e-3)
    assert torch.equal(actual[:, 128:, :128], actual[:, :128, 128:].mT)
