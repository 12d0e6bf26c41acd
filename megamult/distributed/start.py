"""Start and end of communication over torch.distributed, with the process groups that Megatron and DeepSpeed use."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megamult import noise
from megamult.distributed import device, environment, extensions, open_files, process_groups, rendezvous
from megamult.distributed.mesh import Mesh, current_mesh


def initialize(
    tensor: int,
    timeout_minutes: float = 10.0,
    across_nodes: bool = False,
    meeting: rendezvous.Meeting | None = None,
) -> Mesh:
    """Initialize torch.distributed and create the tensor- and data-parallel groups, unless this has been done already.

    Args:
        tensor: tensor-parallel size; must divide the number of processes. Ranks of one tensor-parallel group are
            consecutive, so they share a node if the number of processes of each node is a multiple of `tensor`.
        timeout_minutes: minutes after which a collective ends the process, if some rank has not joined it.
        across_nodes: whether a tensor-parallel group may span nodes.
        meeting: result of the rendezvous of all processes. If it is None, they meet now.

    Raises:
        ValueError: the number of processes is not a multiple of `tensor`, a tensor-parallel group would span nodes, or
            the limit of open files is too low for the connections between ranks.
        megamult.distributed.rendezvous.RanksMissingError: processes are missing.
        megamult.distributed.rendezvous.RefusedError: this process has connected to the port of another launch.
        TimeoutError: on CPUs, another process has been compiling DeepSpeed's shared-memory collectives for longer than
            `megamult.distributed.extensions.LIMIT` seconds.
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
            # If a device is given, NCCL connects all ranks at once, and later groups are split off from this one.
            device_id=here if here.type == "cuda" and processes > 1 else None,
        )
        if here.type == "cpu":  # DeepSpeed loads an operator, and would wait for ever for the lock of a killed process
            first_here = environment.local_rank() == 0
            extensions.release(extensions.build_root(), _say, name="deepspeed_shm_comm*", waits_aloud=first_here)
        with noise.unprinted():
            deepspeed.init_distributed(dist_backend=device.backend(), timeout=timeout, verbose=False)
        if here.type == "cpu":
            _forget_shared_memory()
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() == tensor:
            return current_mesh()
        parallel_state.destroy_model_parallel()
    process_groups.create(tensor, timeout)
    if here.type == "cuda":
        # Megatron forks its CUDA random state around dropout under sequence parallelism, so this state must
        # exist. The models have no dropout, so the seed changes nothing.
        model_parallel_cuda_manual_seed(1)
    return current_mesh()


def _say(line: str) -> None:
    print(f"megamult: {line}", file=sys.stderr, flush=True)


def _forget_shared_memory() -> None:
    """Remove the names in /dev/shm of the buffers that DeepSpeed makes for its shared-memory all-reduce on CPUs.

    DeepSpeed never removes them, 64 MB per rank. Once all ranks have mapped the buffers, the names can be
    removed: the memory is then freed when the processes end.
    """
    torch.distributed.barrier()
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ.get('MASTER_PORT', '')}_*"
    for path in Path("/dev/shm").glob(names):
        path.unlink(missing_ok=True)


def destroy() -> None:
    """Destroy the groups. Ranks that end without this call may abort at exit."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
