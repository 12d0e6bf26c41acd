"""Newton-Schulz: an odd polynomial of a matrix that drives its singular values towards 1.

One step maps X to aX + b(XX^T)X + c(XX^T)^2 X. It does not change the singular vectors of X, and maps each singular
value s to a s + b s^3 + c s^5. Two forms compute the same result:

- The *standard* form computes X in each step.
- The *gram* form computes R = XX^T and Q in each step. Q is the polynomial in R for which QX is the result of the
  steps. R and Q are square matrices with the size of X's smaller dimension (J. Zhang, N. Amsel, B. Chen, T. Dao, "Gram
  Newton-Schulz", blog post, 2026, https://tridao.me/blog/2026/gram-newton-schulz/). Rounding makes the smallest
  eigenvalues of R negative, and each step multiplies these by about a^2 (11.9 for `simple`). After
  :data:`RESTART` steps, the gram form therefore multiplies X by Q and computes R anew, in every dtype.

If X has more rows than columns, X^T X and products from the right take the place of XX^T and products from the left.

How the products are computed is a :class:`Method`: its results differ from those of other methods by rounding only.
:func:`fixed_method` gives one by a rule, and :mod:`megamult.optim.muon.timing` chooses one by its speed. Leading
dimensions of `[..., rows, cols]` are a batch. All functions are pure, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megamult.optim.muon.coefficients import Coefficients
from megamult.optim.muon.symmetric import Products, computed, has_kernel, kernel_suits, product, symmetric_product

Form = Literal["standard", "gram"]

RESTART = 2
"""Number of steps after which the gram form multiplies X by Q and computes R anew."""


@dataclass(frozen=True)
class Method:
    """Way to compute Newton-Schulz for matrices of one shape."""

    form: Form
    products: Products
    """How products with a symmetric result are computed (:mod:`megamult.optim.muon.symmetric`)."""
    together: bool
    """Whether a batch is computed by batched products, or one matrix after the other."""
    dtype: torch.dtype
    """Dtype of the products: fp32, bf16 or fp16, or float64 for tests."""


def fixed_method(
    rows: int, cols: int, steps: int, dtype: torch.dtype, kernel: bool = False, form: Form | None = None
) -> Method:
    """Return a method that depends on nothing but the arguments.

    The kernel computes symmetric products where it suits them. Elsewhere, they are computed by block rows in fp32, and
    whole in bf16 and fp16, because matrix units compute faster than the mirror images can be copied.

    Args:
        rows, cols: shape of the matrices.
        steps: number of steps.
        dtype: dtype of the products.
        kernel: whether the device has the kernel.
        form: the form; if None, the one that takes fewer FLOPs.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    products: Products = "whole" if half else "block_rows"
    if kernel and kernel_suits(min(rows, cols), max(rows, cols), dtype):
        products = "kernel"
    return Method(form or cheaper_form(rows, cols, steps, products), products, True, dtype)


def orthogonalize(matrices: Tensor, steps: Coefficients, dtype: torch.dtype, form: Form | None = None) -> Tensor:
    """Return U p(S) V^T for each matrix, by :func:`fixed_method`; see :func:`orthogonalize_by`."""
    rows, cols = matrices.shape[-2:]
    method = fixed_method(rows, cols, len(steps), dtype, has_kernel(matrices.device), form)
    return orthogonalize_by(matrices, steps, method)


def orthogonalize_by(matrices: Tensor | Sequence[Tensor], steps: Coefficients, method: Method) -> Tensor:
    """Return U p(S) V^T for each matrix, where U S V^T is the matrix divided by its Frobenius norm.

    p is the composition of the polynomials of all steps.

    Args:
        matrices: [..., rows, cols] matrices, or a list of matrices of one shape that may lie anywhere in memory,
            [rows, cols] each; in any floating dtype; not changed.
        steps: coefficients, from :func:`megamult.optim.muon.coefficients.coefficients`.
        method: how to compute the products.

    Returns:
        [..., rows, cols] results in the method's dtype, [matrices, rows, cols] of a list. A zero matrix gives zeros.
    """
    shape = matrices.shape if isinstance(matrices, Tensor) else (len(matrices), *matrices[0].shape)
    rows, cols = shape[-2:]
    given = list(matrices.reshape(-1, rows, cols) if isinstance(matrices, Tensor) else matrices)
    if isinstance(matrices, Tensor) and not given:
        return matrices.new_empty(shape, dtype=method.dtype)
    device, wide = given[0].device, torch.float64 if given[0].dtype == torch.float64 else torch.float32
    # The clamp is the same as in torch.optim.Muon; with it, a zero matrix gives zeros and not NaN. The norms are
    # [matrices, 1], because torch would round a norm without dimensions to the dtype of a bf16 matrix.
    norms = torch.stack(torch._foreach_norm(given, dtype=wide)).clamp(min=1e-7).unsqueeze(-1)
    small, count = min(rows, cols), len(given) if method.together else 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=method.dtype, device=device)

    result, other = empty(len(given), rows, cols), empty(count, rows, cols)
    apply, writes, squares = _standard, len(steps), 2
    if method.form == "gram":
        apply, writes, squares = _gram, len(_runs(steps)), 5
    room: list[Tensor] = []
    for i in range(0, len(given), count):
        here = result[i : i + count]
        # The products write to the two in turn. Begin so that the last one writes to the result.
        x, y = (other, here) if writes % 2 else (here, other)
        for k in range(count):  # each by itself, because torch needs room for fp32 values of what it divides
            # Divide in fp32 before the cast, because elements of the undivided matrix can be out of fp16's range.
            torch.div(given[i + k], norms[i + k], out=x[k])
        room = room or [empty(count, small, small) for _ in range(squares)]
        apply(x, y, steps, method.products, room)
    return result.reshape(shape)


def _runs(steps: Coefficients) -> list[Coefficients]:
    """Return the steps of the gram form between two restarts."""
    return [run for run in (steps[:RESTART], steps[RESTART:]) if run]


def _gram_matrix(x: Tensor, products: Products, out: Tensor) -> Tensor:
    """Compute XX^T, or X^T X if X is tall: the smaller of the two."""
    left, right = (x.mT, x) if x.shape[-2] > x.shape[-1] else (x, x.mT)
    return symmetric_product(left, right, out, products)


def _from_the_side(square: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands of the product of X and a square matrix of its smaller dimension, in their order."""
    return (x, square) if x.shape[-2] > x.shape[-1] else (square, x)


def _standard(x: Tensor, y: Tensor, steps: Coefficients, products: Products, room: list[Tensor]) -> None:
    """Apply the steps to X by the standard form. X and Y get the results in turn, Y first.

    Args:
        x, y: [batch, rows, cols] matrices, and room for others.
        steps: coefficients of the steps.
        products: how symmetric products are computed.
        room: room for square matrices, [batch, n, n] each.
    """
    r, z = room
    for a, b, c in steps:
        _gram_matrix(x, products, r)
        symmetric_product(r, r, z, products, add=(b, r), alpha=c)
        product(*_from_the_side(z, x), y, x, beta=a)
        x, y = y, x


def _gram(x: Tensor, y: Tensor, steps: Coefficients, products: Products, room: list[Tensor]) -> None:
    """Apply the steps to X by the gram form; arguments as in :func:`_standard`."""
    for run in _runs(steps):
        product(*_from_the_side(_polynomial(x, run, products, room), x), y)
        x, y = y, x


def _polynomial(x: Tensor, steps: Coefficients, products: Products, room: list[Tensor]) -> Tensor:
    """Return the matrix Q for which QX (XQ if X is tall) is the result of the steps on X.

    With Z = aI + bR + cR^2, one step is Q <- ZQ and R <- ZRZ. Z is stored without aI, which is added in each use of Z.
    """
    r, q, z, free, other = room
    _gram_matrix(x, products, r)
    for i, (a, b, c) in enumerate(steps):
        symmetric_product(r, r, z, products, add=(b, r), alpha=c)
        if i == 0:
            q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            symmetric_product(z, q, free, products, add=(a, q))
            q, free = free, q
        if i + 1 < len(steps):
            symmetric_product(z, r, free, products, add=(a, r))
            symmetric_product(z, free, other, products, add=(a, free))
            r, other = other, r
    return q


def flops(rows: int, cols: int, steps: int, form: Form | None = None, products: Products = "block_rows") -> int:
    """Return the number of floating-point operations of :func:`orthogonalize_by` for one matrix.

    A multiply-add counts as 2. The kernel's products count as if computed by block rows, of which it computes nearly
    the same share.

    Args:
        rows, cols: shape of the matrix.
        steps: number of steps.
        form: the form; if None, the one that takes fewer FLOPs.
        products: how symmetric products are computed.
    """
    if form is None:
        return min(flops(rows, cols, steps, "standard", products), flops(rows, cols, steps, "gram", products))
    small, large = sorted((rows, cols))
    # FLOPs of a symmetric product, per element of the inner dimension.
    symmetric = 2 * (small * small if products == "whole" else computed(small))
    dense = 2 * small * small * large
    if form == "standard":
        return steps * (symmetric * large + symmetric * small + dense)
    runs = [run for run in (min(steps, RESTART), steps - RESTART) if run > 0]
    # Products in the steps between two restarts: XX^T and QX; R^2 in each step; ZQ in each step after the first; ZR and
    # ZRZ in each step before the last.
    return sum(symmetric * large + dense + symmetric * small * (run + (run - 1) + 2 * (run - 1)) for run in runs)


def workspace(rows: int, cols: int, batch: int = 1) -> int:
    """Return an upper bound on the elements that :func:`orthogonalize_by` holds at once for a batch, beside its input.

    These are, for each matrix, X before and after a step, five square matrices of the smaller dimension, and the room
    in which torch computes a product on a CPU in bf16; or, while one matrix is divided by its norm, this matrix and its
    quotient in fp32, each of which counts twice.
    """
    return 2 * batch * rows * cols + max(batch * (5 * min(rows, cols) ** 2 + rows * cols), 4 * rows * cols)


def cheaper_form(rows: int, cols: int, steps: int, products: Products = "block_rows") -> Form:
    """Return the form that takes fewer FLOPs for one matrix of this shape."""
    standard, gram = (flops(rows, cols, steps, form, products) for form in ("standard", "gram"))
    return "gram" if gram < standard else "standard"


SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(rows, cols)),
    "unit_rms_norm": lambda rows, cols: math.sqrt(rows / cols),
    "shape_scaling": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
}
"""Functions from the shape (rows, cols) of an orthogonalized update to the factor that multiplies it, by name.

The names are those of Emerging-Optimizers (muon.py) and Megatron-LM; torch.optim.Muon has `match_rms_adamw` too.

- `match_rms_adamw`: learning rate and weight decay can be the same as for AdamW (arXiv 2502.16982).
- `spectral`: the factor of `match_rms_adamw` without 0.2. In Emerging-Optimizers, the 0.2 is the argument
  `extra_scale_factor`.
- `unit_rms_norm`: arXiv 2502.07529, https://jeremybernste.in/writing/deriving-muon.
- `shape_scaling`: https://kellerjordan.github.io/posts/muon/."""


def scale(rows: int, cols: int, rule: str) -> float:
    """Return the factor of the orthogonalized update of a logical matrix [rows, cols].

    Args:
        rows, cols: output and input dimension of the whole logical matrix, not of a shard.
        rule: a key of :data:`SCALES`.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in SCALES:
        raise ValueError(f"the update scale {rule!r} is unknown: use one of {', '.join(SCALES)}")
    return SCALES[rule](rows, cols)
