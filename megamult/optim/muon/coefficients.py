"""Polynomials of Newton-Schulz by name: the coefficients (a, b, c) of each step, see
:mod:`megamult.optim.muon.newton_schulz`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
