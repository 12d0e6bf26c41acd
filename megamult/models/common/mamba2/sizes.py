"""Sizes of a Mamba-2 mixer, and how tensor parallelism divides them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megamult.validation import require

InnerNorm = Literal["none", "before_gate", "after_gate"]
"""Norm of the mixer's output: none, RMSNorm(y) SiLU(z), or RMSNorm(y SiLU(z))."""


@dataclass(frozen=True)
class MixerSizes:
    """Global sizes of a mixer."""

    heads: int
    head_dim: int
    state: int
    """Size of the state of one channel."""
    groups: int
    """Number of groups of heads; the heads of a group have B and C in common."""
    kernel: int = 4
    """Tokens that the convolution reads: the present one and those before it."""
    chunk: int = 128
    """Tokens of a chunk (:func:`megamult.models.common.ssd.ssd`)."""
    norm: InnerNorm = "none"
    conv_bias: bool = True
    kernels: Literal["auto", "torch", "fused"] = "auto"
    """Kernels between the projections (:mod:`megamult.models.common.mamba2.scan`)."""

    @property
    def inner(self) -> int:
        """Number of channels of x, z and y."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """Number of rows of B, and of C."""
        return self.groups * self.state

    @property
    def rows(self) -> tuple[int, int, int, int, int]:
        """Number of rows of z, x, B, C and dt in the input projection."""
        return self.inner, self.inner, self.shared, self.shared, self.heads

    def local(self, tensor: int) -> MixerSizes:
        """Return the sizes on one rank. If there are fewer groups than ranks, neighbouring ranks have the same one."""
        return replace(self, heads=self.heads // tensor, groups=max(1, self.groups // tensor))

    def check_sharding(self, tensor: int) -> None:
        """Check that tensor-parallel ranks can share the heads.

        Raises:
            ValueError: they cannot. The message names the keys.
        """
        require(
            self.heads % self.groups == 0,
            f"model.ssm_heads is {self.heads} and model.ssm_groups {self.groups}: every group has equally many heads; "
            "choose a number of groups that divides that of the heads",
        )
        require(
            self.heads % tensor == 0 and (self.groups % tensor == 0 or tensor % self.groups == 0),
            f"parallel.tensor is {tensor}, model.ssm_heads {self.heads} and model.ssm_groups {self.groups}: it must "
            "divide the number of heads, and divide the number of groups or be a multiple of it",
        )
