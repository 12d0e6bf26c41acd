"""Muon on logical matrices, whatever the layout: each is orthogonalized once, whole, by one rank of the whole grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.optim.adamw import TwoPhaseAdamW
from megamult.optim.muon.exchange import Exchange
from megamult.optim.muon.newton_schulz import coefficients, orthogonalize, scale
from megamult.optim.muon.plan import BUCKET_ELEMENTS, Plan, make_plan
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice, buckets
from megamult.zero.virtual import kept_once


class DistributedMuon(TwoPhaseAdamW):
    """Muon (arXiv 2502.16982) for groups of kind `matrix`, AdamW for all others.

    One step, on the reduced and accumulated gradient G of each logical matrix W[out, in] (Q, K, V, gate, up apart)::

        G <- G min(1, clip / ||all gradients but multipliers'||)
        M <- momentum M + (1 - momentum) G                          elementwise, on this rank's slices
        U <- Newton-Schulz(momentum M + (1 - momentum) G) * scale   whole, on the matrix's owner
        W <- W - lr (weight_decay W + U)                            elementwise, on this rank's slices

    `prepare` does all but the last line, for all groups at once, and leaves U where the gradient was (in the gradient's
    dtype). Slices of what is orthogonalized travel to the owners and slices of U back, one all-to-all each; owners are
    spread over the data-parallel x tensor-parallel grid by Newton-Schulz FLOPs (:mod:`megamult.optim.muon.plan`). The
    momentum is fp32, sharded like the ZeRO partition; at ZeRO 0 and outside DeepSpeed the data-parallel ranks share it
    out evenly and all-gather U: each rank's `state_dict` then holds its own share, and loads on that rank alone. Of a
    matrix that tensor parallelism replicates, U is that of the first rank's momentum; every rank keeps its own.

    Args:
        groups: from :func:`megamult.param_groups`.
        momentum: decay rate of M.
        nesterov: False: orthogonalize M itself.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: quintic or polar_express.
        ns_dtype: that Newton-Schulz computes in, fp32, bf16 or fp16; None: fp32 if the model's matrices are, else bf16.
        exchange_dtype: that pieces travel in, fp32 or bf16; None: likewise.
        update_scale: match_rms_adamw, 0.2 sqrt(max(out, in)): learning rate and weight decay of AdamW carry over; or
            spectral, sqrt(out / in).
        bucket_elements: of the matrices that one owner takes from one exchange; bounds temporary memory.
        betas, eps, clip_grad_norm, clip_multipliers, skip_grad_norm, model: as :class:`TwoPhaseAdamW`'s.

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
        for key, dtype, known in (
            ("ns_dtype", ns_dtype, (None, torch.float32, torch.bfloat16, torch.float16)),
            ("exchange_dtype", exchange_dtype, (None, torch.float32, torch.bfloat16)),
        ):
            if dtype not in known:
                raise ValueError(f"{key} is {dtype}: use one of {', '.join(map(str, known))}")
        scale(1, 1, update_scale)
        self._steps = coefficients(ns_coefficients, ns_steps)
        super().__init__(groups, **adamw)
        self.momentum, self.nesterov, self.update_scale = momentum, nesterov, update_scale
        self.ns_dtype, self.exchange_dtype = ns_dtype, exchange_dtype
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
        mesh = partition.mesh
        pieces = kept_once(partition, _is_matrix)
        cuts = [cut for cut in pieces.cuts if _is_matrix(cut.spec)]
        indices = [i for i, piece in enumerate(pieces.slices) if _is_matrix(piece.spec)]
        index_of = {pieces.slices[i].name: k for k, i in enumerate(indices)}
        plan = make_plan(cuts, mesh.grid, len(self._steps), self.bucket_elements)
        slice_of_cut = {c: index_of[cut.name] for c, cut in enumerate(cuts) if cut.name in index_of}
        auto = torch.float32 if all(cut.dtype == torch.float32 for cut in cuts) else torch.bfloat16
        self.ns_dtype, self.exchange_dtype = self.ns_dtype or auto, self.exchange_dtype or auto
        self._exchange = Exchange(plan, mesh, slice_of_cut, self.exchange_dtype, device.local_device())
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
        assert self.exchange_dtype is not None
        gradients = self._pieces.gradients()
        sizes = [self._pieces.slices[i].length for i in self._indices]
        for bucket in buckets(sizes, self.bucket_elements):
            part = self._indices[bucket]
            self._advance([self._pieces.slices[i] for i in part], [gradients[i] for i in part], self._factors[0])
        self._exchange.run([gradients[i] for i in self._indices], self._update)
        self._bytes_gathered += self._pieces.complete(self.exchange_dtype, self.bucket_elements)

    def _advance(self, pieces: list[Slice], gradients: list[Tensor], factor: float) -> None:
        """Take clipped gradients into the momentum, and put what is to be orthogonalized in the gradients' place."""
        momenta = [self._momentum(piece) for piece in pieces]
        values = [gradient.float() for gradient in gradients]  # themselves, unless they are narrower
        if factor != 1.0:
            torch._foreach_mul_(values, factor)
        torch._foreach_lerp_(momenta, values, 1 - self.momentum)
        if self.nesterov:
            torch._foreach_lerp_(values, momenta, self.momentum)
        results = values if self.nesterov else momenta
        if any(result is not gradient for result, gradient in zip(results, gradients, strict=True)):
            torch._foreach_copy_(gradients, results)

    def _momentum(self, piece: Slice) -> Tensor:
        """[length] view of the momentum of a slice; zeros at first."""
        state, (offset, size) = self.state[piece.tensor], piece.kept
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros(size, dtype=torch.float32, device=piece.tensor.device)
            if piece.shared:
                state["momentum_interval"] = (piece.start, piece.length)
        elif piece.shared and tuple(state["momentum_interval"]) != (piece.start, piece.length):
            start, length = state["momentum_interval"]
            raise RuntimeError(
                f"the momentum loaded for {piece.name} is that of elements [{start}:{start + length}], and this rank's "
                f"share is [{piece.start}:{piece.start + piece.length}]: load on each rank the state_dict that it saved"
            )
        return state["momentum_buffer"][offset : offset + piece.length]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the momentum to the parameters' dtype: it stays fp32."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            momentum = state_dict["state"].get(index, {}).get("momentum_buffer")
            if momentum is not None:
                copy = momentum.detach().to(parameter.device, torch.float32, copy=True)
                self.state[parameter]["momentum_buffer"] = copy

    def views(self, partition: Partition) -> Iterator[tuple[str, Slice, Tensor]]:
        """As AdamW's; of matrices the momentum, once over the data-parallel ranks."""
        yield from super().views(partition)
        if self._partition is not partition:
            self._plan(partition)
        assert self._pieces is not None
        for i in self._indices:
            piece = self._pieces.slices[i]
            yield "momentum", piece, self._momentum(piece)

    def _has_moments(self, spec: ParameterSpec) -> bool:
        return not _is_matrix(spec)

    def _update(self, batch: Tensor) -> Tensor:
        """[batch, rows, cols] of momentum to scaled updates."""
        rows, cols = batch.shape[1:]
        assert self.ns_dtype is not None
        update = orthogonalize(batch, self._steps, self.ns_dtype)
        return update.mul_(scale(rows, cols, self.update_scale))

    def _update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if group["kind"] != "matrix":
            super()._update_group(group, parameters)
            return
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, [p.grad for p in parameters if p.grad is not None], alpha=-group["lr"])


def _is_matrix(spec: ParameterSpec) -> bool:
    return spec.kind == "matrix"
