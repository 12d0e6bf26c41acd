"""Newton-Schulz: an odd polynomial of a matrix that drives its singular values towards 1.

One step maps X to aX + b(XX^T)X + c(XX^T)^2 X. It does not change the singular vectors of X, and maps each singular
value s to a s + b s^3 + c s^5. Two forms compute the same result:

- The *standard* form computes X in each step.
- The *gram* form computes R = XX^T and Q in each step. Q is the polynomial in R for which QX is the result of the
  steps. R and Q are square matrices with the size of X's smaller dimension (J. Zhang, N. Amsel, B. Chen, T. Dao, "Gram
  Newton-Schulz", blog post, 2026, https://tridao.me/blog/2026/gram-newton-schulz/). Rounding makes the smallest
  eigenvalues of R negative, and each step multiplies these by about a^2 (11.9 for `simple`). After
  :data:`RESTART` steps, the gram form therefore multiplies X by Q and computes R anew, in every dtype.

If the result of a product is symmetric (XX^T, and products of polynomials in R), only about half of the product is
computed (:mod:`megamult.optim.muon.symmetric`). Leading dimensions of `[..., rows, cols]` are a batch.
All functions are pure, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megamult.optim.muon.symmetric import computed, symmetric_product

Form = Literal["standard", "gram"]
Coefficients = Sequence[tuple[float, float, float]]

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Optimal quintic polynomial for each step, if the singular values before the first step are in [1e-3, 1]. Source:
N. Amsel, D. Persson, C. Musco, R. Gower, "The Polar Express", arXiv 2505.16932, algorithm 1."""

_SAFETY = 1.01
"""Number by which arXiv 2505.16932 divides the singular values before a step, because rounding can leave some above 1.
The last polynomial, which all later steps repeat, is used without this division."""


@dataclass(frozen=True)
class CoefficientSet:
    """Coefficients (a, b, c) of the first steps, and the rule for the steps after them."""

    steps: tuple[tuple[float, float, float], ...]
    after: Literal["again", "last", "nothing"] = "again"
    """Rule for the steps after `steps`. `again`: begin again with the first step. `last`: repeat the last step, which
    leaves singular values near 1. `nothing`: there are none; the number of steps must be len(steps)."""


SIMPLE = (3.4445, -4.7750, 2.0315)
"""Quintic polynomial that is steep at 0. It brings singular values to between about 0.7 and 1.2, not to 1. Source:
K. Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon/; used in arXiv 2502.16982."""

COEFFICIENTS: dict[str, CoefficientSet] = {
    "simple": CoefficientSet((SIMPLE,)),
    # Five steps that were tuned together: F. L. Cesista et al., https://leloykun.github.io/ponder/muon-opt-coeffs/.
    "quintic": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": CoefficientSet(
        (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]), _POLAR_EXPRESS[-1]),
        "last",
    ),
    # Computed by the Remez algorithm on adaptive intervals: E. Grishina, M. Smirnov, M. Rakhuba, arXiv 2506.10935.
    "cans": CoefficientSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "last",
    ),
    # Made for preconditioned input (AOL): T. Boissin, https://github.com/thib-s/flash-newton-schulz. Neither this file
    # nor Emerging-Optimizers preconditions. Singular values above 0.88 change sign, so this set is not suitable for
    # matrices near rank 1.
    "aol": CoefficientSet(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        )
    ),
    # Ten steps of DeepSeek-V4. The last two make singular values converge to 1.
    "deepseekv4": CoefficientSet((SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2, "last"),
    # Cubic polynomials that bring singular values into an interval around 1: H. Huang, arXiv 2606.00371.
    "cubic5": CoefficientSet(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        "nothing",
    ),
}
"""Polynomials by the names that NVIDIA's Emerging-Optimizers (muon_utils.py, 0.4.0) and Megatron-LM give them."""

RESTART = 2
"""Number of steps after which the gram form multiplies X by Q and computes R anew."""


def coefficients(name: str, steps: int) -> Coefficients:
    """Return (a, b, c) of each of `steps` steps.

    Args:
        name: a key of :data:`COEFFICIENTS`.
        steps: number of steps.

    Raises:
        ValueError: the name is unknown, `steps` is less than 1, or the set is for one number of steps only and `steps`
            is another (:attr:`CoefficientSet.after` is `nothing`).
    """
    if steps < 1:
        raise ValueError(f"Newton-Schulz with {steps} steps does nothing: use at least 1 (5 is usual)")
    if name not in COEFFICIENTS:
        raise ValueError(f"Newton-Schulz coefficients {name!r} are unknown: use one of {', '.join(COEFFICIENTS)}")
    chosen = COEFFICIENTS[name]
    known = len(chosen.steps)
    if chosen.after == "nothing" and steps != known:
        raise ValueError(
            f"Newton-Schulz coefficients {name} with {steps} steps: they are made for {known} steps; use that number"
        )
    if chosen.after == "last":
        return [chosen.steps[min(i, known - 1)] for i in range(steps)]
    return [chosen.steps[i % known] for i in range(steps)]


def orthogonalize(matrices: Tensor, steps: Coefficients, dtype: torch.dtype, form: Form | None = None) -> Tensor:
    """Return U p(S) V^T for each matrix, where U S V^T is the matrix divided by its Frobenius norm.

    p is the composition of the polynomials of all steps.

    Args:
        matrices: [..., rows, cols] matrices in any floating dtype; not changed.
        steps: coefficients, from :func:`coefficients`.
        dtype: dtype in which products are computed: fp32, bf16 or fp16.
        form: `standard` or `gram`; if None, the form that takes fewer FLOPs for this shape.

    Returns:
        [..., rows, cols] results in `dtype`. A zero matrix gives zeros.
    """
    rows, cols = matrices.shape[-2:]
    given = matrices.reshape(-1, rows, cols)
    wide = torch.float64 if given.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(given, dim=(-2, -1), keepdim=True, dtype=wide)
    # Divide in fp32 before the cast, because elements of the undivided matrix can be out of fp16's range. The clamp is
    # the same as in torch.optim.Muon; with it, a zero matrix gives zeros and not NaN.
    x = torch.empty(given.shape, dtype=dtype, device=given.device)
    torch.div(given, norm.clamp(min=1e-7), out=x)
    tall = rows > cols
    x = x.mT.contiguous() if tall else x
    if (form or cheaper_form(rows, cols, len(steps))) == "gram":
        x = _gram(x, steps)
    else:
        x = _standard(x, steps)
    return (x.mT if tall else x).reshape(matrices.shape)


def _standard(x: Tensor, steps: Coefficients) -> Tensor:
    for a, b, c in steps:
        r = symmetric_product(x, x.mT)
        x = torch.baddbmm(x, symmetric_product(r, r, add=(b, r), alpha=c), x, beta=a)
    return x


def _gram(x: Tensor, steps: Coefficients) -> Tensor:
    for run in filter(None, (steps[:RESTART], steps[RESTART:])):
        x = torch.bmm(_polynomial(symmetric_product(x, x.mT), run), x)
    return x


def _polynomial(r: Tensor, steps: Coefficients) -> Tensor:
    """Return the matrix Q for which QX is the result of the steps on X.

    With Z = aI + bR + cR^2, one step is Q <- ZQ and R <- ZRZ.

    Args:
        r: [batch, n, n] matrices R = XX^T.
        steps: coefficients of the steps.
    """
    q = None
    for i, (a, b, c) in enumerate(steps):
        z = symmetric_product(r, r, add=(b, r), alpha=c)  # Z without aI, which is added in each use of Z
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric_product(z, q, add=(a, q))
        if i + 1 < len(steps):
            zr = symmetric_product(z, r, add=(a, r))
            r = symmetric_product(z, zr, add=(a, zr))
    assert q is not None
    return q


def flops(rows: int, cols: int, steps: int, form: Form | None = None) -> int:
    """Return the number of floating-point operations of :func:`orthogonalize` for one matrix.

    A multiply-add counts as 2. Symmetric products count as if computed by
    :func:`megamult.optim.muon.symmetric.block_rows`.
    """
    if form is None:
        return min(flops(rows, cols, steps, "standard"), flops(rows, cols, steps, "gram"))
    small, large = sorted((rows, cols))
    symmetric = 2 * computed(small)  # FLOPs of a symmetric product, per element of the inner dimension
    dense = 2 * small * small * large
    if form == "standard":
        return steps * (symmetric * large + symmetric * small + dense)
    runs = [run for run in (min(steps, RESTART), steps - RESTART) if run > 0]
    # Products in the steps between two restarts: XX^T and QX; R^2 in each step; ZQ in each step after the first; ZR and
    # ZRZ in each step before the last.
    return sum(symmetric * large + dense + symmetric * small * (run + (run - 1) + 2 * (run - 1)) for run in runs)


def workspace(rows: int, cols: int) -> int:
    """Return an upper bound on the elements that :func:`orthogonalize` holds at once for one matrix, beside its input.

    These are X before and after a step, and four square matrices of the smaller dimension: R, Z, Q and one product.
    """
    return 2 * rows * cols + 4 * min(rows, cols) ** 2


def cheaper_form(rows: int, cols: int, steps: int) -> Form:
    """Return the form that takes fewer FLOPs for one matrix of this shape."""
    standard, gram = (flops(rows, cols, steps, form) for form in ("standard", "gram"))
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
