"""Muon on logical matrices, whatever the layout: each is orthogonalized once, whole, by one rank of the whole grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megamult import parallel
from megamult.layout import Layout
from megamult.optim.adamw import TwoPhaseAdamW
from megamult.optim.exchange import Exchange
from megamult.optim.newton_schulz import coefficients, orthogonalize, scale
from megamult.optim.plan import BUCKET_ELEMENTS, Plan, make_plan
from megamult.zero.slices import Partition, Slice
from megamult.zero.virtual import VirtualPartition


class DistributedMuon(TwoPhaseAdamW):
    """Muon (arXiv 2502.16982) for groups of kind `matrix`, AdamW for all others.

    One step, on the reduced and accumulated gradient G of each logical matrix W[out, in] (Q, K, V, gate, up apart)::

        G <- G min(1, clip / ||all gradients but multipliers'||)
        M <- momentum M + (1 - momentum) G                          elementwise, on this rank's slices
        U <- Newton-Schulz(momentum M + (1 - momentum) G) * scale   whole, on the matrix's owner
        W <- W - lr (weight_decay W + U)                            elementwise, on this rank's slices

    `prepare` does all but the last line, for all groups at once, and leaves U where the gradient was. Slices of M
    travel to the owners and slices of U back, one all-to-all each; owners are spread over the data-parallel x
    tensor-parallel grid by Newton-Schulz FLOPs (:mod:`megamult.optim.plan`). The momentum is fp32, sharded like the
    ZeRO partition; at ZeRO 0 the data-parallel ranks share it out evenly and all-gather U.

    Args:
        groups: from :func:`megamult.param_groups`.
        momentum: decay rate of M.
        nesterov: False: orthogonalize M itself.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: quintic or polar_express.
        ns_dtype: that Newton-Schulz computes in; None: fp32 for fp32 matrices, else bf16.
        exchange_dtype: that M and U travel in; None: likewise.
        update_scale: match_rms_adamw, 0.2 sqrt(max(out, in)): learning rate and weight decay of AdamW carry over; or
            spectral, sqrt(out / in).
        bucket_elements: of the matrices that one owner takes from one exchange; bounds temporary memory.
        betas, eps, clip_grad_norm, clip_multipliers, model: as :class:`TwoPhaseAdamW`'s.

    Attributes:
        plan: who owns what; None before it is known what ranks hold (the first step, or DeepSpeed's attach).
        bytes_sent: by this rank's exchanges since construction.

    Raises:
        ValueError: as :class:`TwoPhaseAdamW`; a matrix that is not two-dimensional; an unknown setting.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: str = "quintic",
        ns_dtype: torch.dtype | None = None,
        exchange_dtype: torch.dtype | None = None,
        update_scale: str = "match_rms_adamw",
        bucket_elements: int = BUCKET_ELEMENTS,
        **adamw: Any,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: it must be in [0, 1)")
        scale(1, 1, update_scale)
        self._steps = coefficients(ns_coefficients, ns_steps)
        super().__init__(groups, **adamw)
        matrices = [p for group in self.param_groups if group["kind"] == "matrix" for p in group["params"]]
        full = torch.float32 if all(p.dtype == torch.float32 for p in matrices) else torch.bfloat16
        self.momentum, self.nesterov, self.update_scale = momentum, nesterov, update_scale
        self.ns_dtype, self.exchange_dtype = ns_dtype or full, exchange_dtype or full
        self.bucket_elements = bucket_elements
        self.plan: Plan | None = None
        self._bytes_gathered = 0
        self._partition: Partition | None = None  # the one that the three below belong to
        self._pieces: Partition | None = None  # what this rank keeps momentum of
        self._indices: list[int] = []  # of the matrices' slices in it
        self._exchange: Exchange | None = None

    @property
    def bytes_sent(self) -> int:
        """By this rank to others, in all exchanges since construction."""
        return self._bytes_gathered + (self._exchange.bytes_sent if self._exchange else 0)

    def bind(self, partition: Partition) -> None:
        """Plan the exchange now rather than in the first step."""
        super().bind(partition)
        self._plan(partition)

    def _plan(self, partition: Partition) -> None:
        grid = parallel.grid()
        pieces = partition if partition.sharded else VirtualPartition(partition, _is_matrix)
        cuts = [cut for cut in pieces.cuts if _is_matrix(cut.layout)]
        indices = [i for i, piece in enumerate(pieces.slices) if _is_matrix(piece.layout)]
        index_of = {pieces.slices[i].name: k for k, i in enumerate(indices)}
        plan = make_plan(cuts, grid.tensor_size, len(self._steps), self.bucket_elements)
        slice_of_cut = {c: index_of[cut.name] for c, cut in enumerate(cuts) if cut.name in index_of}
        device = partition.slices[0].tensor.device if partition.slices else torch.device("cpu")
        self._exchange = Exchange(plan, grid.rank, slice_of_cut, self.exchange_dtype, device)
        self._partition, self._pieces, self._indices, self.plan = partition, pieces, indices, plan

    @torch.no_grad()
    def prepare(self, partition: Partition) -> None:
        """AdamW's part; then momentum and orthogonalized update of every matrix. Collective over all ranks."""
        super().prepare(partition)
        if self._partition is not partition:
            self._plan(partition)
        if self._skip:
            return
        assert self._factors is not None and self._pieces is not None and self._exchange is not None
        gradients = self._pieces.gradients()
        for i in self._indices:
            self._advance(self._pieces.slices[i], gradients[i], self._factors[0])
        self._exchange.run([gradients[i] for i in self._indices], self._update)
        if isinstance(self._pieces, VirtualPartition):
            self._bytes_gathered += self._pieces.complete(self.exchange_dtype, self.bucket_elements)

    def _advance(self, piece: Slice, gradient: Tensor, factor: float) -> None:
        """Take the clipped gradient into the momentum, and put what is to be orthogonalized in the gradient's place."""
        state = self.state[piece.tensor]
        shared = isinstance(self._pieces, VirtualPartition)  # then the tensor is whole, and this piece all that we keep
        if "momentum_buffer" not in state:
            size = piece.length if shared else piece.tensor.numel()
            state["momentum_buffer"] = torch.zeros(size, dtype=torch.float32, device=piece.tensor.device)
        offset = 0 if shared else piece.offset
        momentum = state["momentum_buffer"][offset : offset + piece.length]
        value = gradient.float()
        if factor != 1.0:
            value.mul_(factor)
        momentum.lerp_(value, 1 - self.momentum)
        gradient.copy_(value.lerp_(momentum, self.momentum) if self.nesterov else momentum)

    def _update(self, batch: Tensor) -> Tensor:
        """[batch, rows, cols] of momentum to scaled updates."""
        rows, cols = batch.shape[1:]
        update = orthogonalize(batch, self._steps, self.ns_dtype)
        return update.mul_(scale(rows, cols, self.update_scale))

    def _apply(self) -> None:
        groups = self.param_groups
        for group in groups:
            if group["kind"] == "matrix":
                for parameter in group["params"]:
                    if parameter.grad is not None:  # at ZeRO 3 all groups but the current sub-group's are empty
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        parameter.add_(parameter.grad, alpha=-group["lr"])
        self.param_groups = [group for group in groups if group["kind"] != "matrix"]
        try:
            super()._apply()
        finally:
            self.param_groups = groups


def _is_matrix(layout: Layout) -> bool:
    return layout.kind == "matrix"
