"""Variables that the optimizer trains in place of multipliers: r = f(u), where AdamW updates u instead of r.

Layers, checkpoints and exports always hold the multipliers r. Only an update uses u: the gradient becomes dL/du =
f'(u) dL/dr, AdamW updates u = f^-1(r), weight decay included, and r becomes f(u). A run is therefore the same, up to
rounding, as one whose parameters are u.

Sources: log-parametrization is in arXiv 2601.04890, gains through softplus in arXiv 2606.25971. Pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ParametrizationName = Literal["direct", "log", "softplus"]


@dataclass(frozen=True)
class Parametrization:
    """A function r = f(u) whose values are positive."""

    name: ParametrizationName
    value: Callable[[Tensor], Tensor]
    """Function r = f(u)."""
    variable: Callable[[Tensor], Tensor]
    """Function u = f^-1(r), for r > 0."""
    slope: Callable[[Tensor], Tensor]
    """Function dr/du at r, as a function of r."""

    @contextlib.contextmanager
    def variables(self, multipliers: Sequence[Tensor]) -> Iterator[None]:
        """Make tensors of multipliers hold u inside the context, for an update, and r of the new u after it.

        A multiplier whose u has not changed keeps its value to the last bit. So do elements of 0, the padding of a
        tensor under ZeRO.
        """
        values = [tensor.detach().clone() for tensor in multipliers]
        before = [torch.where(r > 0, self.variable(r), 0.0) for r in values]
        for tensor, u in zip(multipliers, before, strict=True):
            tensor.detach().copy_(u)
        try:
            yield
        finally:  # also if the update raises: a caller that goes on must not find u where r belongs
            for tensor, r, u in zip(multipliers, values, before, strict=True):
                tensor.detach().copy_(torch.where(tensor == u, r, self.value(tensor.detach())))

    def check(self, not_positive: int) -> None:
        """Check that all multipliers have a variable.

        Args:
            not_positive: number of multipliers that are not positive, the same on all ranks.

        Raises:
            ValueError: there are some.
        """
        if not_positive:
            raise ValueError(
                f"{not_positive} multipliers are not positive, and multipliers.parametrization {self.name} trains only "
                "positive ones: set it to direct"
            )


PARAMETRIZATIONS: Mapping[ParametrizationName, Parametrization | None] = {
    "direct": None,
    "log": Parametrization("log", torch.exp, torch.log, lambda r: r),
    # u = log(e^r - 1) and dr/du = 1 - e^-r, written so that small and large r lose no digits.
    "softplus": Parametrization(
        "softplus",
        # torch's softplus returns its argument above a threshold, where e^-u is still a few roundings.
        lambda u: torch.logaddexp(u, torch.zeros_like(u)),
        lambda r: r + torch.log(-torch.expm1(-r)),
        lambda r: -torch.expm1(-r),
    ),
}
"""Parametrizations by name. None stands for `direct`, in which u is r itself."""


def relative_step(name: ParametrizationName, value: float) -> float:
    """Return how much a multiplier changes, relative to its value, if u changes by a small unit: f'(u) / r."""
    chosen, r = PARAMETRIZATIONS[name], torch.tensor(value, dtype=torch.float64)
    return 1 / value if chosen is None else float(chosen.slope(r) / r)
