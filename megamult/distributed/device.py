"""Device of this process, its backend and its peak rate, and a CPU shim for Megatron-Core.

All other modules ask this one whether there is CUDA.

Megatron-Core allocates with ``torch.cuda.current_device()`` in its rotary embedding, mappings and layers, and forks the
CUDA random state around dropout. Without CUDA, :func:`install_cpu_shim` makes ``torch.cuda.current_device()`` return
``torch.device("cpu")``, and makes the forks do nothing. The models of Megatron-Core need nothing else to run on a CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megamult.distributed import environment


def has_cuda() -> bool:
    """Return whether this process computes on a CUDA GPU: there is one, and DS_ACCELERATOR is unset or `cuda`."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def local_device() -> torch.device:
    """Return the device of this process.

    Within :func:`describing` it is the meta device. Otherwise it is the CPU if the process does not compute on CUDA
    (:func:`has_cuda`), and else the only GPU that the process sees, or, if it sees several, the one with number
    LOCAL_RANK.
    """
    if _describes:
        return torch.device("meta")
    if not has_cuda():
        return torch.device("cpu")
    return torch.device("cuda", environment.local_rank() if torch.cuda.device_count() > 1 else 0)


_describes = False
"""Whether models are made on the meta device."""


@contextlib.contextmanager
def describing() -> Iterator[None]:
    """Let models that are made in the context have shapes and specs, but no memory: on torch's meta device."""
    global _describes
    before, current = _describes, torch.cuda.current_device
    _describes = True
    torch.cuda.current_device = local_device  # type: ignore[assignment]
    try:
        yield
    finally:
        _describes = before
        torch.cuda.current_device = current


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to the GPU of this process, or return the tensor itself if this process computes on the CPU.

    The call returns before the copy is done. Kernels that are queued later on the current stream run after the copy.
    """
    return tensor.pin_memory().to(local_device(), non_blocking=True) if has_cuda() else tensor


def backend() -> str:
    """Return the torch.distributed backend for this device."""
    return "nccl" if has_cuda() else "gloo"


class _NoRandomState:
    """Replacement for Megatron's CUDA random-state tracker: without CUDA there is no state to fork."""

    def is_initialized(self) -> bool:
        return True

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield

    def add(self, name: str, seed: int) -> None:
        """Do nothing, as there is no state to track."""

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Do nothing, as there is no state to restore."""


def install_cpu_shim() -> None:
    """Let Megatron-Core build and run models without CUDA. Do nothing if there is CUDA."""
    if has_cuda():
        return
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    megatron_random._CUDA_RNG_STATE_TRACKER = _NoRandomState()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def prepare(tensor: int = 1) -> torch.device:
    """Select this process's device, install the CPU shim if there is no CUDA, and return the device.

    Args:
        tensor: tensor-parallel size. If it is above 1, CUDA_DEVICE_MAX_CONNECTIONS is set to 1, unless it is already
            set.
    """
    device = local_device()
    # The variable must be set before CUDA starts. Megatron overlaps tensor-parallel collectives with matrix products by
    # the order in which kernels are queued, which needs a single queue. Without tensor parallelism a single queue only
    # delays ZeRO's collectives. Without CUDA the variable does nothing, but Megatron warns if it is missing.
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        install_cpu_shim()
    return device


def memory_bytes() -> int:
    """Return the largest number of bytes that this process has used: allocated on the GPU, or resident on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_PEAK_BF16_FLOPS = {
    # Dense bf16 tensor-core peaks of NVIDIA's data sheets, FLOP/s. The first key found in the device's name is used.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the peak matrix rate of this device in FLOP/s, or None if it is not known: on CPUs, on GPUs that are
    not in the table, and for dtypes other than bf16."""
    if not has_cuda() or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in _PEAK_BF16_FLOPS.items() if key in name), None)
