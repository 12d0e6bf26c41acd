"""Facts that the launcher states about this process, known before any process group exists. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import socket


def rank() -> int:
    """Global rank."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_agent_store() -> bool:
    """Tell whether torchrun's agent, instead of rank 0, serves the store of the rendezvous."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host() -> str:
    """The name of this node."""
    return socket.gethostname()


def machine() -> str:
    """Return an identifier of this node that no other node shares, whatever the nodes are called."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return f"{host()} {boot.read().strip()}"


def set_defaults() -> None:
    """Complete the environment that torch.distributed reads: a task of `srun` takes its rank from SLURM_*, a process
    without a launcher is a world of one. Variables that a launcher has set stay."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        for key, value in _from_slurm().items():
            os.environ.setdefault(key, value)
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as listener:  # any free port, so that two such runs on one machine stay apart
            listener.bind((os.environ["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(listener.getsockname()[1])


_SLURM_PORTS = (20000, 10000)
"""(first, number) of ports, below those that Linux assigns by itself (32768 and up)."""


def _from_slurm() -> dict[str, str]:
    """Return the variables of this task of a job step. Only `srun` sets SLURM_STEP_NUM_TASKS above 1; the process of a
    batch script is no task, whatever the job asked for."""
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
