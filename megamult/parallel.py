"""Process groups: torch.distributed, Megatron's parallel state, and DeepSpeed's view of it (`mpu`)."""

from __future__ import annotations

import datetime

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megamult import device, environment


class ModelParallelUnit:
    """What DeepSpeed asks of `mpu`: Megatron's groups, with "model parallel" meaning tensor parallel."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("get_model_parallel_"):
            name = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        if not name.startswith("get_"):
            raise AttributeError(name)
        return getattr(parallel_state, name)


def initialize(tensor: int, timeout_minutes: float = 30.0) -> ModelParallelUnit:
    """Create torch.distributed (if it is not there yet) and the tensor- and data-parallel groups.

    Args:
        tensor: tensor-parallel size; must divide the number of processes. Ranks of one tensor-parallel group are
            consecutive, so they share a node wherever a node's processes are a multiple of it.
        timeout_minutes: after which a collective that a peer never joins ends the process.

    Raises:
        ValueError: the sizes do not fit.
    """
    processes = environment.world_size()
    if processes % tensor:
        raise ValueError(
            f"parallel.tensor is {tensor} and {processes} processes were started: start a multiple of {tensor}"
        )
    here = device.prepare()
    import deepspeed

    if not torch.distributed.is_initialized():
        environment.set_defaults()
        deepspeed.init_distributed(
            dist_backend=device.backend(),
            timeout=datetime.timedelta(minutes=timeout_minutes),
            auto_mpi_discovery=False,
            verbose=False,
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    if here.type == "cuda":
        # Megatron forks its CUDA random state around dropout under sequence parallelism, and wants one to fork. We
        # have no dropout, so the seed changes nothing.
        model_parallel_cuda_manual_seed(1)
    return ModelParallelUnit()


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
    """The data-parallel group of this rank."""
    return parallel_state.get_data_parallel_group()
