"""Folded multipliers: the model holds effective weights, and the optimizer applies the chain rule to their gradients.

A logical matrix W_eff is s diag(r) W diag(c); let G be dL/dW_eff. The chain rule (equation 4 of arXiv 2601.04890) is
linear in G, and r, c, s and W do not change between micro-batches. It is therefore applied once per optimizer step, to
the reduced and accumulated gradient. Forward and backward are those of a model without multipliers.

W, the latent weight, is kept in fp32 beside the tensor that the optimizer updates, and is sharded like it. All r, c and
s together are one packed fp32 vector, the same on every rank; its gradient takes one all-reduce per step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.multipliers import kernels
from megamult.multipliers.scaling import Band, Factors, PackedScaling, bands
from megamult.multipliers.specs import LEAVES
from megamult.parameters.rectangles import rectangles
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec, Role, Segment, Side
from megamult.zero.partition import Partition

LATENT = "latent_weight"
"""Key of the latent weight W in the optimizer's state."""

_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Vector:
    """Multipliers of one side of one logical matrix."""

    name: str
    """Name of the logical tensor, the same as in the layer implementation."""
    role: Role
    side: Side
    entries: slice
    """Range of their entries in the packed vector, and in its gradient and AdamW state."""


def covers(spec: ParameterSpec, placement: Placement) -> bool:
    """Return whether folded multipliers of this placement scale a parameter."""
    return spec.side is None and any(placement.get(part.role) for part in spec.parts)


@dataclass(frozen=True)
class FoldedMultipliers:
    """Settings of folded multipliers: which ones the matrices of a model have, and how AdamW updates them."""

    placement: Placement
    """Sides of each role that have multipliers."""
    lr: float
    """Peak learning rate; it follows the schedule of the matrices' groups."""
    weight_decay: float = 2e-3
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    initial: Callable[[Role, Side], float] = lambda role, side: 1.0
    """Initial value of the multipliers of each (role, side)."""

    def covers(self, spec: ParameterSpec) -> bool:
        """Return whether a parameter has folded multipliers."""
        return covers(spec, self.placement)

    def bind(self, partition: Partition, state: MutableMapping[Tensor, Any]) -> BoundMultipliers:
        """Create the multipliers of a partition whose masters hold W; move W to `state` and put W_eff in its place.

        Args:
            partition: a checked partition, before the first step.
            state: the optimizer's state.

        Raises:
            ValueError: a master is not in fp32.
        """
        return BoundMultipliers(self, partition, state)


class BoundMultipliers:
    """Multipliers of all matrices of one model, with their gradients and the AdamW that updates them.

    :meth:`FoldedMultipliers.bind` makes them.

    Attributes:
        vectors: all vectors of multipliers.
        values: [entries] multipliers in fp32, the same on every rank.
        gradient: [entries] their gradient at the last step in fp32, summed over ranks, before clipping.
    """

    @torch.no_grad()
    def __init__(self, settings: FoldedMultipliers, partition: Partition, state: MutableMapping[Tensor, Any]) -> None:
        self.partition, self._settings, self._state = partition, settings, state
        self.vectors: list[Vector] = []
        places = self._lay_out()
        here = device.local_device()
        first = [
            torch.full((v.entries.stop - v.entries.start,), settings.initial(v.role, v.side)) for v in self.vectors
        ]
        self.values = torch.cat(first).to(here, torch.float32)
        # The last entry collects the sums of rows and columns that have no multiplier.
        self._sums = self.values.new_zeros(len(self.values) + 1)
        self.gradient = self._sums[:-1]
        self._adamw = torch.optim.AdamW(
            [self.values],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self._adamw.state[self.values] = {
            "step": torch.zeros((), device=here),
            **{key: torch.zeros_like(self.values) for key in _STATES},
        }
        self._slices_of: dict[Tensor, list[int]] = {}  # by tensor that holds folded weights: the indices of its slices
        self._bands_of: dict[int, range] = {}  # by index of each scaled slice: its range of bands
        found: list[Band] = []
        for i, piece in enumerate(partition.slices):
            if not settings.covers(piece.spec):
                continue
            if piece.tensor.dtype != torch.float32:
                raise ValueError(
                    f"{piece.name} is updated in {piece.tensor.dtype}: folded multipliers need fp32 masters; let "
                    "DeepSpeed wrap the optimizer, or train in fp32"
                )
            self._slices_of.setdefault(piece.tensor, []).append(i)
            held = rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length)
            before = len(found)
            found += bands(held, places[piece.name], len(self.values), here.type)
            self._bands_of[i] = range(before, len(found))
        self._scaling = PackedScaling(found, here)
        self._present: Factors | None = None  # factors of the present values; None: not computed yet
        for tensor in self._slices_of:
            state[tensor][LATENT] = tensor.detach().clone()
        if bool((self.values != 1).any()):
            for tensor in self._slices_of:
                self._write(tensor)
            partition.publish()

    def _lay_out(self) -> dict[str, dict[tuple[int, Side], list[Segment]]]:
        """Fill `vectors`; return the packed entries of each (part, side), by name of the parameter."""
        position = 0
        places: dict[str, dict[tuple[int, Side], list[Segment]]] = {}
        for cut in self.partition.cuts:
            if not self._settings.covers(cut.spec):
                continue
            module = cut.name.rpartition(".")[0]
            for side, leaf in LEAVES.items():
                for p in cut.spec.parts_with(self._settings.placement, side):
                    part = cut.spec.parts[p]
                    length = {"row": part.shape[0], "col": part.shape[1], "scalar": 1}[side]
                    name = cut.spec.logical_name(f"{module}.{leaf}" if module else leaf, part)
                    self.vectors.append(Vector(name, part.role, side, slice(position, position + length)))
                    places.setdefault(cut.name, {})[p, side] = [Segment(position, p, 0, length)]
                    position += length
        return places

    @torch.no_grad()
    def chain_rule(self, gradients: list[Tensor]) -> None:
        """Turn dL/dW_eff into dL/dW, in place, and sum the multipliers' gradient over all ranks. One collective.

        Args:
            gradients: the gradient of each slice of the partition.
        """
        mesh = self.partition.mesh
        self._sums.zero_()
        factors = self._factors()
        dots: list[Tensor | None] = []
        for i, numbers in self._bands_of.items():
            piece = self.partition.slices[i]
            counted = bool(self.partition.counted(piece))  # of copies along the data axis, only the first counts
            latent = self.latent(piece.tensor, piece.offset, piece.length)
            for k in numbers:
                band, (rho, kappa) = self._scaling.bands[k], factors.bands[k]
                counts = counted and band.counted  # likewise along the axes that shard the model
                dot, cols = kernels.scale_backward(
                    band.of(gradients[i]),
                    band.of(latent),
                    rho,
                    kappa,
                    band.spans,
                    row=counts and rho is not None,
                    col=counts and kappa is not None,
                    piece=True,
                )
                dots.append(dot)
                if cols is not None:
                    self._scaling.add_cols(self._sums, k, cols)
        self._scaling.add_rows(self._sums, dots, factors)
        mesh.sum_over(self.gradient)

    @torch.no_grad()
    def update(self, factor: float, schedule: float) -> None:
        """Update the multipliers by AdamW: gradient times `factor`, learning rate `schedule` times its peak."""
        self.values.grad = self.gradient * factor
        self._adamw.param_groups[0]["lr"] = self._settings.lr * schedule
        self._adamw.step()
        self._present = None

    @contextlib.contextmanager
    def latent_weights(self, tensors: list[Tensor]) -> Iterator[None]:
        """Make the tensors hold the latent weights W within the context, for an update, and the new W_eff after it."""
        folded = [tensor for tensor in tensors if tensor in self._slices_of]
        effective = [tensor.data for tensor in folded]
        for tensor in folded:
            tensor.data = self._state[tensor][LATENT]
        try:
            yield
        finally:
            for tensor, data in zip(folded, effective, strict=True):
                tensor.data = data
                self._write(tensor)

    def latent(self, tensor: Tensor, offset: int, length: int) -> Tensor:
        """Return a [length] view of the latent weights at `offset` of a tensor; its own values if it is not folded."""
        values = self._state[tensor][LATENT] if tensor in self._slices_of else tensor.detach()
        return values.view(-1)[offset : offset + length]

    def views(self) -> Iterator[tuple[str, Vector, Tensor]]:
        """Yield (name, vector, values) of the multipliers (`weight`) and of their `exp_avg` and `exp_avg_sq`.

        Values are whole on every rank, and may be written in place.
        """
        state = self._adamw.state[self.values]
        for vector in self.vectors:
            for name, packed in (("weight", self.values), *((key, state[key]) for key in _STATES)):
                yield name, vector, packed[vector.entries]

    def restored(self, updates: int) -> None:
        """Recompute W_eff, after multipliers, their AdamW state and the latent weights have been loaded.

        Args:
            updates: number of steps that were applied when that state was saved.
        """
        self._adamw.state[self.values]["step"].fill_(updates)
        self._present = None
        for tensor in self._slices_of:
            self._write(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the packed multipliers and their AdamW state; the latent weights are in the optimizer's own state."""
        return {"values": self.values, **self._adamw.state[self.values]}

    def load_state_dict(self, state: dict[str, Tensor], optimizer_state: MutableMapping[Tensor, Any]) -> None:
        """Restore what :meth:`state_dict` returned in a run of the same model and placement.

        Args:
            state: the result of :meth:`state_dict`.
            optimizer_state: the optimizer's own state, restored before, which holds the latent weights.

        Raises:
            ValueError: the state has a different number of multipliers.
        """
        if state["values"].shape != self.values.shape:
            raise ValueError(
                f"the state has {state['values'].numel()} folded multipliers and this model {self.values.numel()}: "
                "load the state of the same model and placement"
            )
        self._state = optimizer_state
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self._present = None

    @torch.no_grad()
    def _write(self, tensor: Tensor) -> None:
        """Write W_eff of the present multipliers to a tensor."""
        flat, latent = tensor.detach().view(-1), self._state[tensor][LATENT].view(-1)
        flat.copy_(latent)
        factors = self._factors()
        for i in self._slices_of[tensor]:
            piece = self.partition.slices[i]
            for k in self._bands_of[i]:
                band, (rho, kappa) = self._scaling.bands[k], factors.bands[k]
                rows = band.of(flat[piece.offset : piece.offset + piece.length])
                kernels.scale(rows, rho, kappa, band.spans, piece=True)

    def _factors(self) -> Factors:
        """Return the present multipliers of every band; they are looked up once per update."""
        if self._present is None:
            self._present = self._scaling.factors(torch.cat([self.values, self.values.new_ones(1)]))
        return self._present
