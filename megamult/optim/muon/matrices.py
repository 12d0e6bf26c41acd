"""Base class of update rules that need whole logical matrices.

The pieces of each matrix travel to one rank, the matrix's owner, and the pieces of its update travel back. A rule
defines what happens to slices before the exchange, and to whole matrices on their owners. This file has what all such
rules share: which rank stores which state, which rank owns which matrix, and the exchange.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megamult.distributed import device
from megamult.distributed.mesh import Mesh
from megamult.optim.muon.exchange import Exchange
from megamult.optim.muon.plan import BUCKET_ELEMENTS, Plan, make_plan
from megamult.optim.rule import UpdateRule
from megamult.optim.state import StateStore
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Partition, Slice, buckets
from megamult.zero.virtual import kept_once


class Matrices:
    """Logical matrices that one rule updates, with their owners and this rank's slices of them.

    Args:
        partition: the partition of all parameters of the model.
        select: function that takes a parameter's spec and returns whether the rule updates the parameter.
        cost: function from (shapes of all matrices, dtype) to a function from the shape (rows, cols) of a matrix to the
            cost of its update. Owners are chosen so that costs are balanced. Called on all ranks together.
        bucket_elements: see :class:`MatrixRule`.

    Attributes:
        slices: slices whose state this rank stores. Exactly one data-parallel rank stores the state of each element.
        plan: owners and buckets of the matrices.
        dtype: fp32 if all parameters that the rule updates are fp32 in the model, else bf16.
    """

    def __init__(
        self,
        partition: Partition,
        select: Callable[[ParameterSpec], bool],
        cost: Callable[[set[tuple[int, int]], torch.dtype], Callable[[int, int], int]],
        bucket_elements: int,
    ) -> None:
        self.partition = partition
        self._pieces = kept_once(partition, select)
        self._cuts = [cut for cut in self._pieces.cuts if select(cut.spec)]
        self._indices = [i for i, piece in enumerate(self._pieces.slices) if select(piece.spec)]
        self.slices = [self._pieces.slices[i] for i in self._indices]
        self.dtype = torch.float32 if all(cut.dtype == torch.float32 for cut in self._cuts) else torch.bfloat16
        shapes = {(part.shape[0], part.shape[1]) for cut in self._cuts for part in cut.spec.parts}
        self.plan: Plan = make_plan(self._cuts, partition.mesh.grid, cost(shapes, self.dtype), bucket_elements)
        self._bucket_elements = bucket_elements
        self.names = [
            cut.spec.logical_name(cut.name, cut.spec.parts[matrix.part])
            for matrix in self.plan.matrices
            for cut in (self._cuts[matrix.cut],)
        ]
        """Logical name of each matrix, in the order of `plan.matrices`."""

    def owned(self) -> dict[str, int]:
        """Return {name: number of rows} of the matrices that this rank owns."""
        owned = zip(self.names, self.plan.matrices, self.plan.owners, strict=True)
        return {name: matrix.rows for name, matrix, owner in owned if owner == self.partition.mesh.rank}

    def exchange(self, dtype: torch.dtype) -> Exchange:
        """Return a new exchange that sends slices to the owners of matrices and returns the updates, all in `dtype`."""
        index_of = {piece.name: k for k, piece in enumerate(self.slices)}
        slice_of_cut = {c: index_of[cut.name] for c, cut in enumerate(self._cuts) if cut.name in index_of}
        return Exchange(self.plan, self.partition.mesh, slice_of_cut, dtype, device.local_device())

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each slice as a view, [length] each. The caller writes the updates to these views."""
        gradients = self._pieces.gradients()
        return [gradients[i] for i in self._indices]

    def complete(self, dtype: torch.dtype) -> int:
        """Send the updates that were written over gradients to all ranks that hold copies of these gradients.

        Args:
            dtype: dtype in which the updates are sent.

        Returns:
            Number of bytes that this rank sent.
        """
        return self._pieces.complete(dtype, self._bucket_elements)


class MatrixRule(UpdateRule):
    """Update rule that needs whole logical matrices, under any sharding.

    Q, K, V, gate and up are separate matrices, also if one parameter stores several of them.

    :meth:`prepare` computes the updates of all groups and writes them over the gradients, in the gradients' dtype;
    :meth:`apply` only applies learning rate and weight decay. For each bucket, one all-to-all sends the
    results of :meth:`accumulate` to the owners, and another sends the updates back. Owners are chosen among all ranks
    so that the costs of the updates are balanced (:mod:`megamult.optim.muon.plan`).

    Per-element state is fp32 and sharded like the ZeRO partition. At ZeRO 0 and outside DeepSpeed, the data-parallel
    ranks divide this state evenly and all-gather the updates. The `state_dict` of a rank then has only that rank's
    share, and can be loaded only on that rank. If tensor parallelism replicates a matrix, every tensor-parallel rank
    stores this state, but the update is computed from the state on the first of these ranks. Per-row state is fp32, and
    the owner of the matrix stores it.

    Args:
        exchange_dtype: dtype in which pieces are sent: fp32 or bf16. If None, fp32 if the model's matrices are fp32,
            else bf16.
        bucket_elements: largest number of elements that one rank receives or sends in one exchange, unless one matrix
            has more. It bounds temporary memory.

    Attributes:
        matrices: the matrices of the bound partition. It is None before :meth:`bind`, which runs at the first step or
            in :func:`megamult.attach`.

    Raises:
        ValueError: `exchange_dtype` is a dtype other than fp32 and bf16.
    """

    prepares = True

    def __init__(self, *, exchange_dtype: torch.dtype | None = None, bucket_elements: int = BUCKET_ELEMENTS) -> None:
        check_dtype("exchange_dtype", exchange_dtype, (torch.float32, torch.bfloat16))
        self.exchange_dtype, self.bucket_elements = exchange_dtype, bucket_elements
        self.matrices: Matrices | None = None
        self._exchange: Exchange | None = None
        self._bytes_gathered = 0
        self.updating: list[str] = []
        """Logical names of the matrices that :meth:`update` computes now."""

    @property
    def plan(self) -> Plan | None:
        """Owners and buckets of the matrices; None before :meth:`bind`."""
        return None if self.matrices is None else self.matrices.plan

    @property
    def bytes_sent(self) -> int:
        """Number of bytes that this rank has sent to others since the partition was bound."""
        return self._bytes_gathered + (self._exchange.bytes_sent if self._exchange else 0)

    def bind(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> None:
        """Choose the owners of the matrices, and plan the exchange. Collective over all ranks."""
        costs = partial(self.choose_methods, mesh=partition.mesh)
        self.matrices = Matrices(partition, selects, costs, self.bucket_elements)
        self.exchange_dtype = self.exchange_dtype or self.matrices.dtype
        self._exchange, self._bytes_gathered = self.matrices.exchange(self.exchange_dtype), 0

    def plan_only(
        self,
        partition: Partition,
        selects: Callable[[ParameterSpec], bool],
        costs: Callable[[set[tuple[int, int]], torch.dtype], Callable[[int, int], int]],
    ) -> None:
        """Choose the owners of the matrices of a partition that is only planned. Nothing can then be exchanged.

        Args:
            partition, selects: the same as for :meth:`bind`.
            costs: the argument `cost` of :class:`Matrices`.
        """
        self.matrices = Matrices(partition, selects, costs, self.bucket_elements)

    def slices(self, partition: Partition, selects: Callable[[ParameterSpec], bool]) -> list[Slice]:
        """Return the slices whose state this rank stores; each element's state is on exactly one data-parallel rank."""
        assert self.matrices is not None and self.matrices.partition is partition
        return self.matrices.slices

    def rows(self) -> Mapping[str, int]:
        """Return {name: number of rows} of the logical matrices that this rank owns."""
        return {} if self.matrices is None else self.matrices.owned()

    def prepare(self, clip: float, store: StateStore) -> None:
        """Replace the gradients of all matrices by their updates."""
        assert self.matrices is not None and self._exchange is not None and self.exchange_dtype is not None
        slices, names = self.matrices.slices, self.matrices.names
        gradients = self.matrices.gradients()
        for part in buckets([piece.length for piece in slices], self.bucket_elements):
            values = [gradient.float() for gradient in gradients[part]]  # does not copy fp32 gradients
            if clip != 1.0:
                torch._foreach_mul_(values, clip)
            kept = {
                state.name: [store.of_slice(self, state, piece) for piece in slices[part]]
                for state in self.states
                if state.per == "element"
            }
            results = self.accumulate(values, kept)
            if any(result is not gradient for result, gradient in zip(results, gradients[part], strict=True)):
                torch._foreach_copy_(gradients[part], results)
        per_row = [state for state in self.states if state.per == "row"]

        def update(matrices: list[Tensor], numbers: Sequence[int]) -> Tensor:
            batch = self.updating = [names[i] for i in numbers]
            rows = {state.name: store.of_rows(state, batch) for state in per_row}
            result = self.update(matrices, rows)
            for state in per_row:
                store.keep_rows(state, batch, rows[state.name])
            return result

        self._exchange.run(gradients, update)
        self._bytes_gathered += self.matrices.complete(self.exchange_dtype)

    @abstractmethod
    def choose_methods(self, shapes: set[tuple[int, int]], dtype: torch.dtype, mesh: Mesh) -> Callable[[int, int], int]:
        """Choose how to compute updates of matrices of these shapes, and return a function from the shape (rows, cols)
        of a matrix to the cost of its update, in any unit. It gives the same on every rank.

        :meth:`bind` calls this on all ranks together.

        Args:
            shapes: shapes of all matrices.
            dtype: fp32 if all parameters that the rule updates are fp32 in the model, else bf16.
            mesh: mesh of the processes.
        """

    @abstractmethod
    def accumulate(self, gradients: list[Tensor], state: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """Accumulate gradients of slices in the per-element state, on the ranks that store this state.

        Args:
            gradients: [length] clipped gradients of some slices, in fp32; may be overwritten.
            state: [length] state of each of these slices, by :attr:`State.name`; updated in place.

        Returns:
            [length] values of each slice. They are sent to the owners, where they form the whole matrices that
            :meth:`update` gets. The returned tensors must be those of `gradients` or of `state`, because copies would
            take more temporary memory.
        """

    @abstractmethod
    def update(self, matrices: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """Compute the updates of matrices on their owner. At learning rate 1, a weight decreases by its update.

        Args:
            matrices: whole logical matrices of one shape, [rows, cols] each, in `exchange_dtype` or in that of
                gradients. They must not be changed, because they may be parts of this rank's own gradients or state.
            state: [batch, rows] per-row state in fp32, by :attr:`State.name`; updated in place.

        Returns:
            [batch, rows, cols] updates, without weight decay.
        """


def check_dtype(key: str, dtype: torch.dtype | None, known: tuple[torch.dtype, ...]) -> None:
    """Check that a dtype is None or in `known`.

    Args:
        key: name of the setting, for the message.
        dtype: the dtype to check.
        known: the dtypes that the setting may have.

    Raises:
        ValueError: the dtype is not None and not in `known`.
    """
    if dtype is not None and dtype not in known:
        raise ValueError(f"{key} is {dtype}: use one of None, {', '.join(map(str, known))}")
