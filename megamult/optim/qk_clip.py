"""QK-clip: after an update, scale the rows of attention heads whose largest logit exceeded a threshold.

Source: MuonClip in arXiv 2507.20534, which scales the matrices W_Q and W_K of a head. Here the row multipliers of Q and
K are scaled instead, with the same effect: the logits of a head are bilinear in the rows of its Q and in the rows of
the K of its query group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh
from megamult.optim.folded import BoundMultipliers
from megamult.optim.rates import Rates
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import Role
from megamult.zero.partition import Partition

FIGURES = ("qk_clip_heads", "qk_clip_factor", "qk_clip_logit")
"""Names of the three numbers that :meth:`QKClip.figures` returns for a step."""


class MeasuredLogits(Protocol):
    """Largest attention logits of a model's heads. :class:`megamult.models.common.head_logits.HeadLogits` measures
    them."""

    modules: list[str]
    """Name of the module whose weight stores Q and K, for each attention layer of the model."""
    heads: int
    """Number of query heads of each attention layer, over all tensor-parallel ranks."""

    def take(self) -> Tensor:
        """Return, for each head of the model, the largest logit that this rank has measured since the last call.

        The result is [layers, heads] in fp32. It is -inf for a head that this rank has not measured."""


def head_factors(largest: Tensor, threshold: float, groups: int, share: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors that bring attention logits down to a threshold.

    The logits of head h get the factor gamma_h = threshold / largest_h if largest_h is above the threshold, else 1.
    The heads of a query group have one K in common. The factor of this K is the root of the largest gamma of the group,
    and the Q of head h gets the rest of gamma_h::

        k_g = sqrt(max of gamma_h over the heads h of group g),        q_h = gamma_h / k_g

    No factor is above 1. If a head of a group is not clipped, the K of the group does not change. If each head has its
    own K, both Q and K of head h get sqrt(gamma_h).

    Args:
        largest: [layers, heads] largest logit of each head.
        threshold: largest logit that is not clipped, positive.
        groups: number of query groups.
        share: whether K takes a share of gamma. If not, the factors of K are 1, and those of Q are gamma.

    Returns:
        (gamma [layers, heads], factors of Q [layers, heads], factors of K [layers, groups]).
    """
    # A step with an infinite logit has a NaN gradient and is skipped, so such a logit needs no factor.
    clipped = (largest > threshold) & largest.isfinite()
    gamma = torch.where(clipped, threshold / largest, 1.0)
    by_group = gamma.unflatten(1, (groups, -1))
    of_keys = by_group.amax(2).sqrt() if share else torch.ones_like(by_group[..., 0])
    return gamma, (by_group / of_keys.unsqueeze(2)).flatten(1), of_keys


class QKClip:
    """QK-clip on the row multipliers of Q and K.

    K can take a share of a factor (:func:`head_factors`) only if it has trained row multipliers in all attention
    layers. If not, the whole factor goes to Q. Each optimizer needs its own object, because :meth:`bind` stores where
    the optimizer's tensors hold the multipliers.

    Args:
        threshold: largest attention logit that is not clipped.
        logits: measured logits of the model.
    """

    def __init__(self, threshold: float, logits: MeasuredLogits) -> None:
        self._threshold, self._logits = threshold, logits
        self._groups, self._share = 1, False
        # Positions of the elements to scale in each flattened tensor, and the position of their factors in `_factors`.
        self._scaled: dict[Tensor, tuple[Tensor, Tensor]] = {}
        here = device.local_device()
        self._factors = torch.ones(0, device=here)  # for each attention layer: of Q by head, then of K by group
        self._figures = torch.tensor([0.0, 1.0, -torch.inf], device=here)

    def bind(self, partition: Partition, rates: Rates, folded: BoundMultipliers | None) -> None:
        """Find the row multipliers of Q and K.

        Args:
            partition: partition of this rank.
            rates: factors of learning rate and weight decay, by role and side. Multipliers whose learning-rate factor
                is 0 are not trained, and QK-clip does not scale them.
            folded: the folded multipliers, already bound, or None if there are none.

        Raises:
            ValueError: the Q of an attention layer has no trained row multipliers.
        """
        modules, heads = self._logits.modules, self._logits.heads
        constant = {role for (role, side), rate in rates.multipliers.items() if side == "row" and rate.lr == 0}
        rows_of = {(module, role): rows for module, role, rows in _present(partition, folded) if role not in constant}
        lacking = [module for module in modules if (module, "q") not in rows_of]
        if lacking:
            raise ValueError(
                f"Q has no trained row multipliers in {len(lacking)} attention layers, the first is {lacking[0]}: "
                "leave multipliers.qk_clip out, or give q trained row multipliers"
            )
        self._share = all((module, "k") in rows_of for module in modules)
        head_dim = rows_of[modules[0], "q"] // heads
        # If K takes no share, it does not matter which heads have one K in common.
        self._groups = rows_of[modules[0], "k"] // head_dim if self._share else heads
        first = {}  # index of the first factor of each vector
        for i, module in enumerate(modules):
            first[module, "q"] = i * (heads + self._groups)
            if self._share:
                first[module, "k"] = first[module, "q"] + heads
        elements, factors = defaultdict[Tensor, list[Tensor]](list), defaultdict[Tensor, list[Tensor]](list)
        for rows in _held(partition, folded):
            if (rows.module, rows.role) in first:
                count = torch.arange(rows.length)
                elements[rows.tensor].append(rows.start + count)
                factors[rows.tensor].append(first[rows.module, rows.role] + (rows.row + count) // head_dim)
        here = device.local_device()
        self._scaled = {
            tensor: (torch.cat(elements[tensor]).to(here), torch.cat(factors[tensor]).to(here)) for tensor in elements
        }

    @torch.no_grad()
    def decide(self, mesh: Mesh, skip: bool) -> None:
        """Compute the factors of this step from the logits of all ranks. All ranks must call this together; it takes
        one collective.

        Args:
            mesh: mesh of the processes.
            skip: whether the step is skipped. If it is, no head is clipped.
        """
        largest = mesh.max_over(self._logits.take())
        threshold = torch.inf if skip else self._threshold
        gamma, of_queries, of_keys = head_factors(largest, threshold, self._groups, self._share)
        self._factors = torch.cat([of_queries, of_keys], dim=1).view(-1)
        self._figures = torch.stack([(gamma < 1).sum(), gamma.amin(), largest.amax()])

    @torch.no_grad()
    def scale(self, tensors: Iterable[Tensor]) -> None:
        """Scale the rows of clipped heads in tensors that hold multipliers and have just been updated. Other tensors,
        and rows of other heads, do not change."""
        for tensor in tensors:
            if tensor in self._scaled:
                elements, factors = self._scaled[tensor]
                flat = tensor.detach().view(-1)
                flat[elements] = (flat[elements] * self._factors[factors]).to(flat.dtype)

    def figures(self) -> dict[str, float]:
        """Return the number of heads that the last step clipped, the smallest gamma of a head (1 if none was clipped),
        and the largest logit of all heads before the step's update."""
        return dict(zip(FIGURES, self._figures.tolist(), strict=True))


class _Rows(NamedTuple):
    """Rows [row, row + length) of a vector of row multipliers, which are elements [start, start + length) of the
    flattened `tensor`."""

    module: str
    role: Role
    row: int
    tensor: Tensor
    start: int
    length: int


def _present(partition: Partition, folded: BoundMultipliers | None) -> Iterator[tuple[str, Role, int]]:
    """Yield (module, role, number of rows) of all vectors of row multipliers in the model, the same on every rank."""
    for cut in partition.cuts:
        if cut.spec.side == "row":
            yield from ((cut.name.rpartition(".")[0], part.role, part.rows) for part in cut.spec.parts)
    for vector in folded.vectors if folded is not None else ():
        if vector.side == "row":
            yield vector.module, vector.role, vector.entries.stop - vector.entries.start


def _held(partition: Partition, folded: BoundMultipliers | None) -> Iterator[_Rows]:
    """Yield the row multipliers that this rank updates."""
    for piece in partition.slices:
        if piece.spec.side == "row":
            module = piece.name.rpartition(".")[0]
            for r in rectangles(piece.spec, partition.mesh.coordinates, piece.start, piece.length):
                role = piece.spec.parts[r.part].role
                yield _Rows(module, role, r.row, piece.tensor, piece.offset + r.offset, r.height)
    for vector in folded.vectors if folded is not None else ():
        if folded is not None and vector.side == "row":
            start, stop = vector.entries.start, vector.entries.stop
            yield _Rows(vector.module, vector.role, 0, folded.values, start, stop - start)
