"""Variables that the optimizer trains in place of multipliers: r = f(u), where AdamW updates u instead of r.

Layers, checkpoints and exports always hold the multipliers r. Only an update uses u: the gradient becomes dL/du =
f'(u) dL/dr, AdamW updates u = f^-1(r) and applies weight decay to it, and r becomes f(u). A run is therefore the
same, up to rounding, as one whose parameters are u.

Sources: arXiv 2601.04890 for r = exp(u); arXiv 2606.25971 for r = softplus(u), where multipliers are called gains. The
module does no communication.
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
    """Function from r to the derivative dr/du at that point."""

    @contextlib.contextmanager
    def variables(self, multipliers: Sequence[Tensor]) -> Iterator[None]:
        """Replace the multipliers r in the tensors by u within the context, and by r = f(u) at the end of the context.

        The update runs within the context. A multiplier whose u the update does not change keeps its value to the last
        bit. So does an element that is 0, which is padding under ZeRO.
        """
        values = [tensor.detach().clone() for tensor in multipliers]
        before = [torch.where(r > 0, self.variable(r), 0.0) for r in values]
        for tensor, u in zip(multipliers, before, strict=True):
            tensor.detach().copy_(u)
        try:
            yield
        finally:  # also if the update raises, so that a caller that continues does not find u in place of r
            for tensor, r, u in zip(multipliers, values, before, strict=True):
                tensor.detach().copy_(torch.where(tensor == u, r, self.value(tensor.detach())))

    def check(self, not_positive: int) -> None:
        """Check that all multipliers have a variable u, which only a positive multiplier has.

        Args:
            not_positive: number of multipliers that are not positive, the same on all ranks.

        Raises:
            ValueError: a multiplier is not positive.
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
        # Above u = 20, torch's softplus returns u itself, and fp64 results would lack the term e^-u.
        lambda u: torch.logaddexp(u, torch.zeros_like(u)),
        lambda r: r + torch.log(-torch.expm1(-r)),
        lambda r: -torch.expm1(-r),
    ),
}
"""Parametrizations by name. None stands for `direct`, in which u is r itself."""


def relative_step(name: ParametrizationName, value: float) -> float:
    """Return f'(u) / r at r = `value`: the relative change of a multiplier r per small change of its variable u."""
    chosen, r = PARAMETRIZATIONS[name], torch.tensor(value, dtype=torch.float64)
    return 1 / value if chosen is None else float(chosen.slope(r) / r)
