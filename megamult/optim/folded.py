"""Folded multipliers: the model holds effective weights, and the optimizer applies the chain rule to their gradients.

The effective weight of a logical matrix is W_eff = s diag(r) W diag(c). W is the latent weight, r and c are the row and
column multipliers, and s is the scalar. The chain rule (equation 4 of arXiv 2601.04890) is linear in dL/dW_eff, and r,
c, s and W do not change between the micro-batches of a step. The chain rule is therefore applied once per optimizer
step, to the reduced and accumulated gradient. The forward and backward passes are the same as in a model without
multipliers.

The optimizer's state holds W in fp32 for each tensor that the optimizer updates, and W is sharded like that tensor.
The multipliers r, c and s of all matrices are one packed fp32 vector, which is the same on every rank. The gradient of
this vector takes one all-reduce per step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.multipliers import kernels
from megamult.multipliers.parametrization import Parametrization
from megamult.multipliers.scaling import Band, Factors, PackedScaling, bands
from megamult.optim.adamw import AdamW
from megamult.optim.packed_multipliers import Vector, covers, lay_out
from megamult.optim.rates import ONE, Rates, Stretch, apply_by_rate
from megamult.optim.state import STEP
from megamult.parameters.initial import Initial
from megamult.parameters.rectangles import rectangles
from megamult.parameters.roles import Placement
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition

LATENT = "latent_weight"
"""Key of the latent weight W in the optimizer's state."""

_STATES = tuple(state.key for state in AdamW.states)


@dataclass(frozen=True)
class FoldedMultipliers:
    """Settings of folded multipliers: which matrices have them on which sides, and how AdamW updates them."""

    placement: Placement
    """Sides that have multipliers, by role of the matrix."""
    lr: float
    """Peak learning rate of the multipliers. The schedule of the first param group scales it."""
    weight_decay: float = 2e-3
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    shared_columns: bool = False
    """Whether all logical matrices of one parameter that have column multipliers have the same ones."""
    initial: Initial = field(default_factory=Initial)
    """Initial values of the multipliers."""
    rates: Rates = field(default_factory=Rates)
    """Factors of the multipliers' learning rate and weight decay, by role and side."""
    constant_lr: bool = False
    """Whether the learning rate stays at its peak in all steps."""
    parametrization: Parametrization | None = None
    """Variable that AdamW trains in place of a multiplier; None means the multiplier itself."""

    def covers(self, spec: ParameterSpec) -> bool:
        """Return whether a parameter has folded multipliers."""
        return covers(spec, self.placement)

    def bind(self, partition: Partition, state: MutableMapping[Tensor, Any]) -> BoundMultipliers:
        """Create the multipliers of a partition.

        On entry the fp32 masters, which are the tensors that the optimizer updates, must hold the initial weights.
        Compute W from these and write it to `state`; then set the masters to W_eff.

        Args:
            partition: the partition, before the first step and after :meth:`Partition.check`.
            state: the optimizer's state, by tensor.

        Raises:
            ValueError: a master is not in fp32; or an initial multiplier is not positive, and the settings have a
                :class:`Parametrization`, which allows only positive multipliers.
        """
        return BoundMultipliers(self, partition, state)


class BoundMultipliers:
    """Multipliers of all matrices of one model, with their gradients and an AdamW optimizer that updates them.

    :meth:`FoldedMultipliers.bind` makes this object.

    Attributes:
        vectors: name, role, side and position of each vector of multipliers.
        values: [entries] all multipliers, packed, in fp32; the same on every rank.
        gradient: [entries] gradient of the last step, in fp32, summed over ranks, before clipping. It is the gradient
            of `values`, or of the variables that AdamW trains in their place if the settings have a parametrization.
    """

    @torch.no_grad()
    def __init__(self, settings: FoldedMultipliers, partition: Partition, state: MutableMapping[Tensor, Any]) -> None:
        self.partition, self._settings, self._state = partition, settings, state
        self.vectors, places = lay_out(partition.cuts, settings.placement, settings.shared_columns)
        here = device.local_device()
        # Vectors that are shared are stored once.
        stored = {(v.entries.start, v.entries.stop): v for v in self.vectors}
        first = [
            torch.full((stop - start,), settings.initial.value(v.role, v.side)) for (start, stop), v in stored.items()
        ]
        self.values = torch.cat(first).to(here, torch.float32)
        self._check()
        # Rows and columns without a multiplier share the last entry. Its sum is not used.
        self._sums = self.values.new_zeros(len(self.values) + 1)
        self.gradient = self._sums[:-1]
        self._rule = AdamW(settings.betas, settings.eps)
        self._kept = {STEP: torch.zeros((), device=here), **{key: torch.zeros_like(self.values) for key in _STATES}}
        rates = settings.rates.multipliers
        stretches = [Stretch(start, stop, rates.get((v.role, v.side), ONE)) for (start, stop), v in stored.items()]
        self._stretches = {self.values: stretches} if any(stretch.rate != ONE for stretch in stretches) else {}
        self._constant = [stretch for stretch in stretches if stretch.rate.lr == 0]
        self._slices_of: dict[Tensor, list[int]] = {}  # indices of the slices of each folded tensor
        self._bands_of: dict[int, range] = {}  # range of the bands of each folded slice, by the slice's index
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
        self._present: Factors | None = None  # factors from `values`; None if they must be computed anew
        for tensor in self._slices_of:
            state[tensor][LATENT] = tensor.detach().clone()
        if settings.initial.divide_weights:
            inverse = self._scaling.factors(torch.cat([1 / self.values, self.values.new_ones(1)]))
            for tensor in self._slices_of:
                self._scale(tensor, state[tensor][LATENT].view(-1), inverse)
        if bool((self.values != 1).any()):
            for tensor in self._slices_of:
                self._write(tensor)
            partition.publish()

    @torch.no_grad()
    def chain_rule(self, gradients: list[Tensor]) -> None:
        """Turn dL/dW_eff into dL/dW in place, and set `gradient`, the multipliers' gradient summed over all ranks.

        All ranks must call this together; it takes one collective.

        Args:
            gradients: [length] dL/dW_eff of each slice of the partition; dL/dW afterwards.
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
                counts = counted and band.counted  # the same for copies along the model's axes
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
        if self._settings.parametrization is not None:
            self.gradient.mul_(self._settings.parametrization.slope(self.values))
        for stretch in self._constant:
            self.gradient[stretch.start : stretch.stop] = 0

    def lr(self, schedule: float) -> float:
        """Return the multipliers' learning rate of a step, before the factors of single roles.

        Args:
            schedule: the global learning rate of the step as a fraction of its peak.
        """
        return self._settings.lr * (1.0 if self._settings.constant_lr else schedule)

    @torch.no_grad()
    def update(self, factor: float, schedule: float) -> None:
        """Update the multipliers by one AdamW step.

        Args:
            factor: clip factor, by which the gradient is multiplied.
            schedule: learning rate of this step as a fraction of its peak.
        """
        settings = self._settings
        group = {**self._rule.defaults, "lr": self.lr(schedule), "weight_decay": settings.weight_decay}
        kept = {key: [value] for key, value in self._kept.items()}
        parametrization = settings.parametrization
        with parametrization.variables([self.values]) if parametrization else contextlib.nullcontext():
            apply_by_rate(self._rule, group, [self.values], [self.gradient * factor], kept, self._stretches)
        self._present = None

    @contextlib.contextmanager
    def latent_weights(self, tensors: list[Tensor]) -> Iterator[None]:
        """Make tensors with folded multipliers hold W inside the context, so that the optimizer can update W there.

        When the context ends, these tensors get W_eff of the new W.

        Args:
            tensors: tensors that the optimizer updates. Those without folded multipliers are ignored.
        """
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
        """Return a [length] view of W for the elements [offset, offset + length) of a flattened tensor.

        For a tensor without folded multipliers, the tensor itself is W.
        """
        values = self._state[tensor][LATENT] if tensor in self._slices_of else tensor.detach()
        return values.view(-1)[offset : offset + length]

    def views(self) -> Iterator[tuple[str, Vector, Tensor]]:
        """Yield (name, vector, values) three times for each vector of multipliers.

        The values named `weight` are the multipliers; those named `exp_avg` and `exp_avg_sq` are AdamW's moments.
        `values` is a view with one element for each multiplier, the same on every rank, and may be written to.
        """
        for vector in self.vectors:
            for name, packed in (("weight", self.values), *((key, self._kept[key]) for key in _STATES)):
                yield name, vector, packed[vector.entries]

    def restored(self, updates: int) -> None:
        """Recompute W_eff after multipliers, their AdamW state and the latent weights have been loaded.

        Args:
            updates: number of applied steps in the loaded state; AdamW continues to count from it.

        Raises:
            ValueError: a loaded multiplier is not positive, and the settings have a :class:`Parametrization`, which
                allows only positive multipliers.
        """
        self._kept[STEP].fill_(updates)
        self._present = None
        self._check()
        for tensor in self._slices_of:
            self._write(tensor)

    def _check(self) -> None:
        """Check that all multipliers are positive if the settings have a parametrization r = f(u).

        All ranks hold the same multipliers, so either all ranks raise or none does.

        Raises:
            ValueError: a multiplier r is not positive. There is then no variable u = f^-1(r) that AdamW could train.
        """
        if self._settings.parametrization is not None:
            self._settings.parametrization.check(int((~(self.values > 0)).sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the packed multipliers and their AdamW state. The latent weights W are not included: they are in the
        state dict of the optimizer that trains the matrices."""
        return {"values": self.values, **self._kept}

    def load_state_dict(self, state: dict[str, Tensor], optimizer_state: MutableMapping[Tensor, Any]) -> None:
        """Load a result of :meth:`state_dict`, made with the same model and placement, and recompute W_eff.

        Args:
            state: the result of :meth:`state_dict`.
            optimizer_state: the optimizer's state, already loaded, which holds the latent weights.

        Raises:
            ValueError: the state has a different number of multipliers; or a loaded multiplier is not positive, and
                the settings have a :class:`Parametrization`, which allows only positive multipliers.
        """
        if state["values"].shape != self.values.shape:
            raise ValueError(
                f"the state has {state['values'].numel()} folded multipliers, and this model has "
                f"{self.values.numel()}: load the state of the same model and placement"
            )
        self._state = optimizer_state
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self._check()
        self._present = None
        # The model's own state dict has W_eff. If it was loaded before the optimizer was bound, W_eff was taken for the
        # initial weights then, and scaled by the initial multipliers.
        for tensor in self._slices_of:
            self._write(tensor)

    @torch.no_grad()
    def _write(self, tensor: Tensor) -> None:
        """Write W_eff to a folded tensor, from its latent weights and the present multipliers."""
        flat, latent = tensor.detach().view(-1), self._state[tensor][LATENT].view(-1)
        flat.copy_(latent)
        self._scale(tensor, flat, self._factors())

    def _scale(self, tensor: Tensor, values: Tensor, factors: Factors) -> None:
        """Multiply `values` in place by the factors of the rows and columns to which they belong.

        Args:
            tensor: the folded tensor whose slices and bands tell the position of each value.
            values: [numel] one value for each element of `tensor`.
            factors: factors of the rows and columns of all bands (:class:`Band`).
        """
        for i in self._slices_of[tensor]:
            piece = self.partition.slices[i]
            for k in self._bands_of[i]:
                band, (rho, kappa) = self._scaling.bands[k], factors.bands[k]
                rows = band.of(values[piece.offset : piece.offset + piece.length])
                kernels.scale(rows, rho, kappa, band.spans, piece=True)

    def _factors(self) -> Factors:
        """Return the present multipliers of all bands (:class:`Band`), computed anew only if they have changed."""
        if self._present is None:
            self._present = self._scaling.factors(torch.cat([self.values, self.values.new_ones(1)]))
        return self._present
