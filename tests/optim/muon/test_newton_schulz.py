"""Newton-Schulz against singular value decompositions in float64, in both forms and every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megamult.optim.muon import newton_schulz
from megamult.optim.muon.coefficients import _POLAR_EXPRESS, COEFFICIENTS, Coefficients, coefficients
from megamult.optim.muon.newton_schulz import Method, flops, orthogonalize, orthogonalize_by, scale, workspace

SHAPES = [(96, 40), (40, 96), (130, 300), (256, 256), (1, 7), (7, 1), (65, 129)]


def reference(matrix: Tensor, steps: Coefficients) -> Tensor:
    """U p(S) V^T in float64, p being the steps applied to the singular values one after the other."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ill_conditioned(rows: int, cols: int) -> Tensor:
    """Singular values from 1 down to 1e-6, as those of a gradient."""
    k = min(rows, cols)
    u, _, vt = torch.linalg.svd(random(rows, cols).double(), full_matrices=False)
    return (u @ torch.diag(torch.logspace(0, -6, k, dtype=torch.float64)) @ vt).float()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def amplification(steps: Coefficients) -> float:
    """By how much the steps can enlarge the rounding of a singular value in [0, 1]: the largest slope of all together.
    Most sets have it at 0 (the product of their a); `cans` and `cubic5`, which leave their interval at 1, have it
    there."""
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    slope = torch.ones_like(s)
    for a, b, c in steps:
        slope *= a + 3 * b * s**2 + 5 * c * s**4
        s = a * s + b * s**3 + c * s**5
    return float(slope.abs().max())


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrix", [random, ill_conditioned])
def test_the_polynomial_is_applied_to_the_singular_values(matrix, shape: tuple[int, int], name: str) -> None:
    steps, given = coefficients(name, 5), matrix(*shape)
    # Rounding of the input direction, 2^-24, grows by the slopes; both are relative to singular values near 1.
    # The factor 2 is for the roundings of the five steps themselves, which grow less.
    assert relative(orthogonalize(given, steps, torch.float32), reference(given, steps)) < 2 * 2**-24 * amplification(
        steps
    )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("products", ["whole", "block_rows"])
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["simple", "polar_express"])
def test_all_methods_are_the_same_polynomial(name: str, steps: int, form, products, together: bool) -> None:
    """Several matrices, wide and tall, so that each but the first is computed in room that another one has used."""
    chosen, given = coefficients(name, steps), torch.stack([random(130, 150, seed=i) for i in range(3)]).double()
    # float64: what remains is the amplified rounding, with room for the sums' lengths.
    tolerance = 100 * 2**-53 * amplification(chosen)
    for matrices in (given, given.mT):
        update = orthogonalize_by(matrices, chosen, Method(form, products, together, torch.float64))
        for one, matrix in zip(update, matrices, strict=True):
            assert relative(one, reference(matrix, chosen)) < tolerance


@pytest.mark.parametrize(("dtype", "form"), [(torch.bfloat16, None), (torch.float16, None), (torch.float16, "gram")])
@pytest.mark.parametrize("shape", [(96, 40), (256, 256), (64, 300)])
def test_half_precision_stays_near_where_singular_values_are_large(dtype: torch.dtype, form, shape) -> None:
    # On a random matrix singular values start at about 0.1, where the rest of the slope is small: a few units of
    # rounding (2^-8, 2^-11) per step, ten products deep.
    steps, given = coefficients("simple", 5), random(*shape)
    actual = orthogonalize(given, steps, dtype, form)
    assert actual.dtype == dtype
    assert relative(actual, reference(given, steps)) < 20 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["simple", "polar_express"])
def test_the_gram_form_does_not_blow_up_on_an_ill_conditioned_matrix(name: str, dtype: torch.dtype) -> None:
    update = orthogonalize(ill_conditioned(64, 300), coefficients(name, 5), dtype, "gram")
    # The image of `simple` is below 1.21, Polar Express' below 1.13 (0 to 1 as input); rounding may add a little.
    assert torch.linalg.matrix_norm(update.double(), ord=2) < 1.5


def test_without_its_restart_the_gram_form_would_blow_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail: spurious negative eigenvalues grow by 11.9 per step."""
    monkeypatch.setattr(newton_schulz, "RESTART", 5)
    update = orthogonalize(ill_conditioned(64, 300), coefficients("simple", 5), torch.bfloat16, "gram")
    assert not torch.linalg.matrix_norm(update.double(), ord=2) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_matrix_gives_a_zero_update_beside_others(dtype: torch.dtype) -> None:
    batch = torch.stack([random(20, 30), torch.zeros(20, 30), random(20, 30, seed=1)])
    update = orthogonalize(batch, coefficients("simple", 5), dtype)
    assert torch.equal(update[1], torch.zeros(20, 30, dtype=dtype))
    assert (update[0] != 0).any() and (update[2] != 0).any()


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, int]) -> None:
    steps, batch = coefficients("simple", 5), random(3, *shape)
    together = orthogonalize(batch, steps, torch.float32)
    for one, alone in zip(together, batch, strict=True):
        # The library may choose other kernels for a batch: amplified rounding, as above.
        assert relative(one, orthogonalize(alone, steps, torch.float32).double()) < 2 * 2**-24 * amplification(steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_size_of_the_input_does_not_matter(dtype: torch.dtype) -> None:
    """A power of two changes no digit: fp16 must not overflow at 2^30, nor lose what is small at 2^-20."""
    steps, given = coefficients("simple", 5), random(40, 96)
    expected = orthogonalize(given, steps, dtype)
    assert torch.equal(orthogonalize(given * 2**30, steps, dtype), expected)
    assert torch.equal(orthogonalize(given * 2**-20, steps, dtype), expected)


def test_the_input_is_not_changed() -> None:
    given = random(40, 96)
    before = given.clone()
    orthogonalize(given, coefficients("simple", 5), torch.float32)
    assert torch.equal(given, before)


@pytest.mark.parametrize("products", ["whole", "block_rows"])
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(512, 1408), (1408, 512), (256, 256), (130, 300), (30, 40)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, int], steps: int, form, products) -> None:
    method = Method(form, products, True, torch.float32)
    with FlopCounterMode(display=False) as counter:
        orthogonalize_by(random(2, *shape), coefficients("simple", steps), method)
    assert counter.get_total_flops() == 2 * flops(*shape, steps, form, products)


def peak_bytes(do: Callable[[], object]) -> int:
    """The most bytes that torch holds at once on the CPU, of those that it allocates while `do` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        do()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 512), (3, 512, 64), (2, 256, 256), (1, 256, 512)])
def test_the_bound_on_memory_holds(shape: tuple[int, int, int], together: bool, form, given: torch.dtype) -> None:
    matrices, steps = random(*shape).to(given), coefficients("simple", 5)
    for dtype in (torch.float32, torch.bfloat16):
        method = Method(form, "whole", together, dtype)
        peak = peak_bytes(lambda method=method: orthogonalize_by(matrices, steps, method))
        # Beside it there are the norms of the matrices, and what libraries ask for: some kilobytes.
        assert 0 < peak <= workspace(*shape[1:], shape[0]) * dtype.itemsize + 16384


def test_symmetric_products_save_what_they_promise() -> None:
    dense = 5 * (2 * 2 * 512**2 * 1408 + 2 * 512**3)
    # Standard form, symmetric parts at 5/8; the gram form saves more on a tall matrix and nothing on a square one.
    assert flops(512, 1408, 5, "standard") == 5 * (2 * 512**2 * 1408 * (1 + 5 / 8) + 2 * 512**3 * 5 / 8)
    assert flops(512, 1408, 5) == flops(512, 1408, 5, "gram") < 0.56 * dense
    assert flops(512, 512, 5) == flops(512, 512, 5, "standard")


def test_polar_express_maps_its_interval_onto_one_centred_at_1_step_by_step() -> None:
    """The property that defines the coefficients (arXiv 2505.16932): a wrong digit would break it."""
    low, high = 1e-3, 1.0
    for a, b, c in _POLAR_EXPRESS:
        x = torch.linspace(low, high, 1_000_001, dtype=torch.float64)
        image = a * x + b * x**3 + c * x**5
        low, high = float(image.min()), float(image.max())
        assert low + high == pytest.approx(2, abs=1e-9)
    assert low == pytest.approx(1, abs=1e-12)


def image(name: str, steps: int, low: float, high: float) -> list[tuple[float, float]]:
    """Smallest and largest value of what each step makes of the interval that the step before it made."""
    found = []
    for a, b, c in coefficients(name, steps):
        x = torch.linspace(low, high, 1_000_001, dtype=torch.float64)
        values = a * x + b * x**3 + c * x**5
        low, high = float(values.min()), float(values.max())
        found.append((low, high))
    return found


def test_the_other_sets_have_the_properties_that_they_were_made_for() -> None:
    """A wrong digit would break them: sources give four decimals."""
    x = torch.linspace(1e-2, 1, 1_000_001, dtype=torch.float64)
    for a, b, c in coefficients("quintic", 5):
        x = a * x + b * x**3 + c * x**5
    assert (float(x.min()), float(x.max())) == pytest.approx((0.9778, 1.0318), abs=5e-4)
    # Remez' polynomials on the interval that the step before leaves: centred at 1 (arXiv 2506.10935).
    assert all(low + high == pytest.approx(2, abs=5e-3) for low, high in image("cans", 5, 1e-3, 1.0))
    # Every step of the relaxed cubic reaches 1.3, and no further (arXiv 2606.00371).
    assert all(high == pytest.approx(1.3, abs=1e-5) for _, high in image("cubic5", 5, 7e-3, 1.0))
    low, _ = image("cubic5", 5, 7e-3, 1.0)[-1]
    assert low > 0.69
    # Its last two steps are Newton-Schulz's own, to which 1 is a fixed point with slope and curvature 0.
    assert coefficients("deepseekv4", 8) == coefficients("simple", 8)
    low, high = image("deepseekv4", 10, 1e-2, 1.0)[-1]
    assert 1 - 0.02 < low < high < 1 + 0.06
    # Symmetric about 0 from the second step on; without its preconditioning the largest singular values turn over.
    low, high = image("aol", 4, 1e-3, 1.0)[-1]
    assert -low == pytest.approx(high, abs=1e-5) and high == pytest.approx(1.0844, abs=1e-3)
    assert image("aol", 1, 0.88, 0.88)[0][0] > 0 > image("aol", 1, 0.89, 0.89)[0][0]


def test_steps_beyond_a_set_begin_again_or_repeat_the_last() -> None:
    assert coefficients("simple", 3) == [(3.4445, -4.7750, 2.0315)] * 3
    assert coefficients("quintic", 7)[5:] == coefficients("quintic", 2)
    for name, known in (("polar_express", 8), ("cans", 5), ("deepseekv4", 10)):
        assert list(coefficients(name, known + 2))[known - 1 :] == [coefficients(name, known)[-1]] * 3


def test_scales_are_of_the_whole_matrix() -> None:
    assert scale(4096, 1024, "match_rms_adamw") == scale(1024, 4096, "match_rms_adamw") == pytest.approx(12.8)
    assert scale(4096, 1024, "spectral") == scale(1024, 4096, "spectral") == 64
    assert scale(4096, 1024, "unit_rms_norm") == 2 and scale(1024, 4096, "unit_rms_norm") == 0.5
    assert scale(4096, 1024, "shape_scaling") == 2 and scale(1024, 4096, "shape_scaling") == 1


def test_mistakes_name_the_choices() -> None:
    with pytest.raises(ValueError, match="simple, quintic, polar_express, cans"):
        coefficients("cubic", 5)
    with pytest.raises(ValueError, match="at least 1"):
        coefficients("simple", 0)
    with pytest.raises(ValueError, match="cubic5 with 4 steps: they are made for 5"):
        coefficients("cubic5", 4)
    with pytest.raises(ValueError, match="match_rms_adamw, spectral, unit_rms_norm, shape_scaling"):
        scale(2, 2, "original")
