"""The process grid with named axes: this process's coordinate on each axis, and its process group along the axis.

A :class:`Mesh` is made once, together with the groups (:func:`megamult.distributed.start.initialize`), and passed to
the code that needs it. A user's own training loop may have made groups already: :func:`current_mesh` describes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megamult.distributed.model_parallel_unit import ModelParallelUnit
from megamult.parameters.axes import Axis, Coordinates, Grid


@dataclass(frozen=True, eq=False)
class Mesh:
    """Coordinates of this process, and its process groups."""

    coordinates: Coordinates
    groups: Mapping[Axis, ProcessGroup] = field(default_factory=dict)
    """This process's group along each axis that has several processes or for which a group was made."""
    world: ProcessGroup | None = None
    """Group of all processes, or None if there is only this process and no torch.distributed."""

    @property
    def grid(self) -> Grid:
        """Sizes of all axes."""
        return self.coordinates.grid

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.coordinates.rank

    @property
    def size(self) -> int:
        """Number of all processes."""
        return self.grid.size

    def rank_on(self, axis: Axis) -> int:
        """Return this process's rank along an axis."""
        return self.coordinates.on(axis)[0]

    def size_of(self, axis: Axis) -> int:
        """Return the number of processes along an axis."""
        return self.grid.size_of(axis)

    @property
    def mpu(self) -> ModelParallelUnit:
        """Object to pass to `deepspeed.initialize` as `mpu`."""
        return ModelParallelUnit()

    def sum_over(self, tensor: torch.Tensor, axis: Axis | None = None) -> torch.Tensor:
        """Sum a tensor in place over the processes along an axis, or over all processes if `axis` is None.

        Collective over these processes.

        Returns:
            The same tensor.
        """
        size = self.size if axis is None else self.size_of(axis)
        if size > 1:
            torch.distributed.all_reduce(tensor, group=self.world if axis is None else self.groups[axis])
        return tensor

    def max_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace each element of a tensor by its maximum over all processes. Collective over all processes.

        Returns:
            The same tensor.
        """
        if self.size > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.world)
        return tensor

    def sum_on_first(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place on rank 0. On other ranks the tensor is undefined afterwards.
        Collective over all processes."""
        if self.world is not None:
            torch.distributed.reduce(tensor, dst=0, group=self.world)

    def send_from_first(self, tensor: torch.Tensor, axis: Axis) -> None:
        """Replace a tensor by that of the first process along an axis. Collective over the processes along the axis."""
        if self.size_of(axis) > 1:
            group = self.groups[axis]
            torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group=group)

    def barrier(self) -> None:
        """Wait for all processes. Collective over all processes."""
        if self.world is not None:
            torch.distributed.barrier(group=self.world)

    def broadcast_objects(self, objects: list[object]) -> None:
        """Replace the items of a list by those of rank 0. Collective over all processes."""
        if self.world is not None:
            torch.distributed.broadcast_object_list(objects, src=0, group=self.world)

    def gather_objects(self, value: object) -> list[object]:
        """Return every process's value, by rank. Collective over all processes."""
        if self.world is None:
            return [value]
        values: list[object] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.world)
        return values


ALONE = Mesh(Coordinates(Grid()))
"""Mesh of one process without torch.distributed."""


def current_mesh() -> Mesh:
    """Return the mesh that describes the existing groups.

    If Megatron has groups, the mesh has these groups. If not, all processes are data-parallel ranks. Without
    torch.distributed the mesh has one process.

    Raises:
        ValueError: Megatron's groups have axes other than tensor and data, or the ranks of a tensor-parallel group are
            not consecutive. (In Megatron's default order they are.)
    """
    world = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    if world is None:
        return ALONE
    if not parallel_state.model_parallel_is_initialized():
        coordinates = Coordinates(Grid(data=world.size()), data=world.rank())
        return Mesh(coordinates, {"data": world}, world)
    tensor, data = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    grid = Grid(tensor=tensor.size(), data=data.size())
    coordinates = Coordinates(grid, tensor=tensor.rank(), data=data.rank())
    if (experts := parallel_state.get_expert_model_parallel_world_size()) > 1:
        raise ValueError(
            f"Megatron's expert-parallel size is {experts}: megamult supports only data x tensor parallelism; leave it "
            "at 1"
        )
    if (coordinates.rank, grid.size) != (world.rank(), world.size()):
        raise ValueError(
            f"rank {world.rank()} of {world.size()} is data-parallel rank {data.rank()} of {data.size()} and "
            f"tensor-parallel rank {tensor.rank()} of {tensor.size()}: megamult supports only data x tensor "
            "parallelism in Megatron's order; leave pipeline, context and expert parallelism at 1"
        )
    return Mesh(coordinates, {"tensor": tensor, "data": data}, world)
