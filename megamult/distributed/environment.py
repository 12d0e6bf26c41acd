"""Facts about this process that are known before any process group exists, mostly from the launcher's environment.

The module imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import socket


def rank() -> int:
    """Return the global rank of this process."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_agent_store() -> bool:
    """Return whether torchrun's agent, and not rank 0, serves the store of the rendezvous."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host() -> str:
    """Return the name of this node."""
    return socket.gethostname()


def machine() -> str:
    """Return an identifier of this node that no other node has, even if another node has the same name."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return f"{host()} {boot.read().strip()}"


def set_defaults() -> None:
    """Set the missing environment variables that torch.distributed reads.

    A task of `srun` gets them from SLURM_*, and a process without a launcher becomes the only rank. Variables that a
    launcher has set are not changed.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        for key, value in _from_slurm().items():
            os.environ.setdefault(key, value)
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as listener:  # a free port, so that runs without a launcher get different ports
            listener.bind((os.environ["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(listener.getsockname()[1])


_SLURM_PORTS = (20000, 10000)
"""(first port, number of ports) to choose from, all below the ports that Linux assigns by itself (32768 and up)."""


def _from_slurm() -> dict[str, str]:
    """Return the variables for this process, which is a task of a Slurm job step.

    SLURM_STEP_NUM_TASKS is above 1 only in tasks of `srun`, so :func:`set_defaults` recognizes them by it. The process
    that runs the batch script itself is not such a task, however many tasks the job asked for.
    """
    first, count = _SLURM_PORTS
    # Steps of one job that run at the same time get different ports.
    port = first + (int(os.environ["SLURM_JOB_ID"]) * 16 + int(os.environ["SLURM_STEP_ID"])) % count
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's node list: gpu007 for `gpu[007-010,12],login`."""
    name = re.match(r"[^,\[]*(?:\[([^\]]*)\][^,\[]*)*", nodes)
    assert name is not None
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", name[0])
