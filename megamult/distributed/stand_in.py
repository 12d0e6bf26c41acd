"""Process groups of one process that stand in where a model is only described, and nothing is sent or started."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import torch

from megamult.distributed import device, process_groups, start


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Provide Megatron's process groups with this process as their only member.

    torch's fake backend makes them, which opens no socket. If there are process groups already, these are used; they
    must be those of tensor-parallel size 1.
    """
    if torch.distributed.is_initialized():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend too

    device.install_cpu_shim()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        process_groups.create(1, datetime.timedelta(minutes=1))
        yield
    finally:
        start.destroy()
