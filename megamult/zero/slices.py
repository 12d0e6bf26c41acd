"""The second hinge beside the layout: flat intervals of parameters, with their masters and reduced gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.layout import Layout


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + length) of the flattened tensor-parallel shard of one parameter."""

    name: str
    layout: Layout
    start: int
    length: int
    master: Tensor
    """[length] view of the fp32 master weights."""
    source: Tensor
    """[length] view of the model's own values of the same elements, in the model's dtype."""


class Partition(ABC):
    """What one rank's optimizer updates, seen the same way for every ZeRO class.

    `sharded` says whether data-parallel ranks hold different slices (ZeRO 1 to 3) or all hold all (ZeRO 0).
    """

    slices: list[Slice]
    sharded: bool

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The reduced gradient of each slice, [length] each, aligned with `slices`.

        Valid between the backward pass of the last micro-batch and DeepSpeed's `step`. They are views: writing to
        them changes what the optimizer will be given.
        """

    def check(self) -> None:
        """Prove the map: every slice's master must hold the very values of the parameter that it claims to be.

        Weights are random, so a wrong offset, order or size shows.

        Raises:
            RuntimeError: it does not, as after a change inside DeepSpeed.
        """
        import deepspeed

        for piece in self.slices:
            if not torch.equal(piece.master.to(piece.source.dtype), piece.source):
                raise RuntimeError(
                    f"DeepSpeed {deepspeed.__version__}, {type(self).__name__}: the master weights at the place of "
                    f"{piece.name}[{piece.start}:{piece.start + piece.length}] hold other values: this version lays "
                    "out its partitions differently; install the version in constraints.txt"
                )
