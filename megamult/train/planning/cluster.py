"""Cluster on which a run is planned: GPUs, their memory and peak rate, and the bandwidths between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from megamult.parameters.axes import Grid


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. Bandwidths are per GPU and direction."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs of a node; with `cpu`, processes of a node."""
    memory: float = 80.0
    """Memory of a GPU in GB (10^9 bytes)."""
    peak: float = 989.0
    """Peak rate of dense matrix products in TFLOP/s of a GPU, in train.dtype."""
    within: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    between: float = 50.0
    """GB/s that a GPU sends to other nodes, through a network adapter of its own."""
    efficiency: float = 0.5
    """Share of `peak` that forward and backward reach while they compute, without communication; Newton-Schulz too."""
    reserve: float = 0.1
    """Share of `memory` that is left to CUDA, NCCL, temporaries of single operators and the allocator's gaps."""
    cuda: bool = True
    """Whether it computes on CUDA GPUs, where some operators keep less for backward."""

    @property
    def ranks(self) -> int:
        """Number of processes, one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may use."""
        return self.memory * 1e9 * (1 - self.reserve)

    @property
    def flops(self) -> float:
        """FLOP/s that a GPU reaches while it computes."""
        return self.peak * 1e12 * self.efficiency

    def mistakes(self) -> list[str]:
        """Return all mistakes in the figures, each as fact, value and remedy."""
        found = [
            f"--{name} is {getattr(self, name)}: it must be {'a positive number' if name in _NUMBERS else 'above 0'}"
            for name in (*_NUMBERS, "memory", "peak", "within", "between", "efficiency")
            if not 0 < getattr(self, name) < math.inf
        ]
        if not 0 <= self.reserve < 1:
            found.append(f"--reserve is {self.reserve}: it must be from 0 to below 1")
        if self.efficiency > 1:
            found.append(f"--efficiency is {self.efficiency}: it is a share of --peak, and must be at most 1")
        return found

    def ring(self, grid: Grid, axis: str) -> float:
        """Return the bytes per second that rings of the ranks along an axis move through each of them.

        Tensor-parallel ranks are consecutive, so they share a node if their number divides `gpus_per_node`. The ranks
        of a data-parallel group share a node only if all ranks do. A group over several nodes makes as many rings as it
        has ranks in a node, each through the network adapters of other ranks. Every ring passes every rank of a node,
        so `within` bounds what all of them move together.
        """
        node, tensor = self.gpus_per_node, grid.tensor
        if self.nodes == 1 or (axis == "tensor" and node % tensor == 0):
            return 1e9 * self.within
        # Where neither of two sizes divides the other, the node with the fewest ranks of a group counts.
        members = math.gcd(node, tensor) if axis == "tensor" else max(1, node // tensor)
        return 1e9 * min(self.within, members * self.between)

    @property
    def pairwise(self) -> float:
        """Bytes per second that a rank sends to ranks of which most are in other nodes, if there are other nodes."""
        return 1e9 * (self.within if self.nodes == 1 else self.between)


_NUMBERS = ("nodes", "gpus_per_node")

PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "h100": (
        {"memory": 80.0, "peak": 989.0, "within": 450.0, "between": 50.0},
        "NVIDIA H100 SXM data sheet: 80 GB, 1,979 TFLOP/s in bf16 with sparsity, NVLink 900 GB/s in both directions; "
        "one 400 Gb/s network adapter per GPU, as in a DGX H100",
    ),
    "h200": (
        {"memory": 141.0, "peak": 989.0, "within": 450.0, "between": 50.0},
        "NVIDIA H200 SXM data sheet: 141 GB, 1,979 TFLOP/s in bf16 with sparsity, NVLink 900 GB/s in both directions; "
        "one 400 Gb/s network adapter per GPU, as in a DGX H200",
    ),
    "a100": (
        {"memory": 80.0, "peak": 312.0, "within": 300.0, "between": 25.0},
        "NVIDIA A100 80GB SXM data sheet: 80 GB, 312 TFLOP/s in bf16, NVLink 600 GB/s in both directions; one 200 Gb/s "
        "network adapter per GPU, as in a DGX A100",
    ),
    "cpu": (
        {"gpus_per_node": 1, "memory": 4.0, "peak": 0.1, "within": 1.0, "between": 1.0, "cuda": False},
        "guesses for a process on one core of a server; give --memory, --peak and the bandwidths of your own",
    ),
}
"""Figures of devices by name, and where they are from."""


def cluster(preset: str, given: dict[str, Any]) -> Cluster:
    """Return the cluster of a preset with the figures that a user gave in place of its own."""
    own = {field.name for field in fields(Cluster)}
    return replace(Cluster(**PRESETS[preset][0]), **{name: value for name, value in given.items() if name in own})
