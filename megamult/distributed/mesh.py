"""Process groups: torch.distributed, Megatron's parallel state, and DeepSpeed's view of it (`mpu`)."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megamult.distributed import device, environment, extensions, open_files, process_groups, rendezvous
from megamult.parameters import axes
from megamult.parameters.axes import Coordinates

Result = TypeVar("Result")


class ModelParallelUnit:
    """What DeepSpeed asks of `mpu`: Megatron's groups, with "model parallel" meaning tensor parallel."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("get_model_parallel_"):
            name = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        if not name.startswith("get_"):
            raise AttributeError(name)
        return getattr(parallel_state, name)


def initialize(
    tensor: int,
    timeout_minutes: float = 10.0,
    across_nodes: bool = False,
    meeting: rendezvous.Meeting | None = None,
) -> ModelParallelUnit:
    """Create torch.distributed (if it is not there yet) and the tensor- and data-parallel groups (unless they are).

    Args:
        tensor: tensor-parallel size; must divide the number of processes. Ranks of one tensor-parallel group are
            consecutive, so they share a node wherever a node's processes are a multiple of it.
        timeout_minutes: after which a collective that a peer never joins ends the process.
        across_nodes: let a tensor-parallel group span nodes.
        meeting: of all processes; None: they meet now.

    Raises:
        ValueError: the sizes do not fit, a tensor-parallel group would span nodes, or the limit of open files is too
            low for the connections between ranks.
        megamult.distributed.rendezvous.NobodyThere: not all processes came.
        megamult.distributed.rendezvous.Refused: this process came to another launch's port.
        TimeoutError: DeepSpeed's operator is being compiled by another process, which does not end.
    """
    environment.set_defaults()
    open_files.raise_limit()
    processes = environment.world_size()
    if processes % tensor:
        raise ValueError(
            f"parallel.tensor is {tensor} and {processes} processes were started: start a multiple of {tensor}"
        )
    here = device.prepare(tensor)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    import deepspeed

    if not torch.distributed.is_initialized():
        open_files.check_limit(environment.rank(), processes, tensor, gloo=device.backend() == "gloo")
        meeting = meeting or rendezvous.meet(rendezvous.SECONDS)
        if not across_nodes:
            meeting.check_nodes(tensor)
        meeting.store.set_timeout(timeout)
        torch.distributed.init_process_group(
            device.backend(),
            store=meeting.store,
            rank=environment.rank(),
            world_size=processes,
            timeout=timeout,
            # NCCL then connects at once, and splits later groups off.
            device_id=here if here.type == "cuda" and processes > 1 else None,
        )
        if here.type == "cpu":  # where DeepSpeed loads an operator, and would wait for a leftover lock for ever
            first_here = environment.local_rank() == 0
            extensions.release(extensions.build_root(), _say, name="deepspeed_shm_comm*", waits_aloud=first_here)
        deepspeed.init_distributed(dist_backend=device.backend(), timeout=timeout, verbose=False)
        if here.type == "cpu":
            _forget_shared_memory()
    if parallel_state.model_parallel_is_initialized():
        if tensor_group().size() == tensor:
            return ModelParallelUnit()
        parallel_state.destroy_model_parallel()
    process_groups.create(tensor, timeout)
    if here.type == "cuda":
        # Megatron forks its CUDA random state around dropout under sequence parallelism, and wants one to fork. We
        # have no dropout, so the seed changes nothing.
        model_parallel_cuda_manual_seed(1)
    return ModelParallelUnit()


def everywhere(do: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `do` on every rank, and let all know where it fails. Collective over all ranks.

    Returns:
        (its result, None) if no rank raises ValueError or OSError, else (None, the first such rank's message).
    """
    result, message = None, None
    try:
        result = do()
    except (ValueError, OSError) as error:
        message = str(error)
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    first = next((each for each in messages if each is not None), None)
    return (result, None) if first is None else (None, first)


def _say(line: str) -> None:
    print(f"megamult: {line}", file=sys.stderr, flush=True)


def _forget_shared_memory() -> None:
    """DeepSpeed's operator for CPUs leaves a buffer of 64 MB per rank in /dev/shm for ever. Once all ranks have mapped
    them their names can go: the memory then goes with the processes."""
    torch.distributed.barrier()
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ.get('MASTER_PORT', '')}_*"
    for path in Path("/dev/shm").glob(names):
        path.unlink(missing_ok=True)


def destroy() -> None:
    """Take the groups down; ranks that leave without it may abort at exit."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tensor_group() -> torch.distributed.ProcessGroup:
    """The tensor-parallel group of this rank."""
    return parallel_state.get_tensor_model_parallel_group()


def data_group() -> torch.distributed.ProcessGroup:
    """The data-parallel group of this rank: Megatron's, or everyone where Megatron has no groups."""
    if not parallel_state.model_parallel_is_initialized():
        return torch.distributed.distributed_c10d._get_default_group()
    return parallel_state.get_data_parallel_group()


@dataclass(frozen=True)
class Grid:
    """This process among the data-parallel x tensor-parallel ranks."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int

    @property
    def rank(self) -> int:
        """The global rank: those of one tensor-parallel group are consecutive."""
        return self.data_rank * self.tensor_size + self.tensor_rank

    @property
    def size(self) -> int:
        """All processes."""
        return self.data_size * self.tensor_size

    @property
    def coordinates(self) -> Coordinates:
        """This process in the grid of named axes."""
        return Coordinates(
            axes.Grid(tensor=self.tensor_size, data=self.data_size), tensor=self.tensor_rank, data=self.data_rank
        )


def grid() -> Grid:
    """Where this process is; one process without torch.distributed is a grid of its own.

    Raises:
        ValueError: Megatron's groups are not laid out data-parallel x tensor-parallel alone.
    """
    if not torch.distributed.is_initialized():
        return Grid(0, 1, 0, 1)
    data = data_group()
    if not parallel_state.model_parallel_is_initialized():
        return Grid(data.rank(), data.size(), 0, 1)
    tensor = tensor_group()
    found = Grid(data.rank(), data.size(), tensor.rank(), tensor.size())
    world = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    if (found.rank, found.size) != world:
        raise ValueError(
            f"rank {world[0]} of {world[1]} is data-parallel rank {data.rank()} of {data.size()} and tensor-parallel "
            f"rank {tensor.rank()} of {tensor.size()}: megamult knows data x tensor parallelism in Megatron's order; "
            "leave pipeline, context and expert parallelism at 1"
        )
    return found
