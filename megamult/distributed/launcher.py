"""What a rank can learn of its launcher: the launcher's own processes, the ranks' hosts, and the launch's name."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path

from megamult.distributed import environment


def _command(process: int) -> list[str]:
    """Return the command line of a process, or an empty list if the process has ended or may not be read."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    return []


def _parent(process: int) -> int:
    """Return the id of a process's parent, or 0 if it cannot be read."""
    with contextlib.suppress(OSError):
        # The second field is the program's name in parentheses. The name may contain any character, so the fields are
        # counted from the last parenthesis on.
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return 0


def hosts_of_ranks() -> dict[int, str]:
    """Return the host of each rank under DeepSpeed's launcher. Under other launchers, whose own messages name the
    hosts, return an empty dictionary."""
    for argument in _command(os.getppid()):
        name, _, value = argument.partition("=")
        if name == "--world_info":
            with contextlib.suppress(ValueError):
                world = json.loads(base64.urlsafe_b64decode(value))
                return dict(enumerate(host for host, slots in world.items() for _ in slots))
    return {}


def launchers() -> list[int]:
    """Return the ids of the launcher processes above this rank. If one of them ends, the run must end too.

    The first id is that of the process that started this rank. If that process is DeepSpeed's launcher for one node and
    its parent is the `deepspeed` command, the second id is that of the command. The command passes no signals on, so a
    rank learns that the command was stopped only from the command's end. The list is empty if no known launcher started
    this rank.
    """
    parent = os.getppid()
    command = _command(parent)
    if "deepspeed.launcher.launch" in command:
        above = _parent(parent)
        runner = any(Path(part).name in ("deepspeed", "ds") for part in _command(above)[:2])
        return [parent, above] if runner else [parent]
    return [parent] if any(Path(part).name == "torchrun" or part == "torch.distributed.run" for part in command) else []


def process() -> str:
    """Return a unique name of the launcher process that started this rank; "" if no known launcher did."""
    above = launchers()
    if not above:
        return ""
    with contextlib.suppress(OSError, IndexError):
        begun = Path(f"/proc/{above[0]}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
        return f"{environment.machine()} {os.readlink('/proc/self/ns/pid')} {above[0]} {begun}"
    return ""


def launch() -> str:
    """Return the unique name of this launch: MEGAMULT_LAUNCH, torchrun's --rdzv-id, or the Slurm job step whose tasks
    are the ranks. Return "" if there is none of these."""
    if name := os.environ.get("MEGAMULT_LAUNCH"):
        return f"MEGAMULT_LAUNCH {name}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = os.environ["TORCHELASTIC_RUN_ID"]
        return "" if name == "none" else f"torchrun {name}"  # "none", torchrun's default, is no unique name
    if not launchers() and os.environ.get("SLURM_STEP_NUM_TASKS") == str(environment.world_size()):
        return f"Slurm {os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return ""


def siblings() -> tuple[int, int]:
    """Return (first rank, number of ranks) of the ranks that this rank's launcher starts on its node.

    The result is (this rank, 1) if the launcher does not say which these are.
    """
    rank, hosts = environment.rank(), hosts_of_ranks()
    if rank in hosts:
        here = [each for each, host in hosts.items() if host == hosts[rank]]
        return here[0], len(here)
    if "LOCAL_WORLD_SIZE" in os.environ:
        return rank - environment.local_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    return rank, 1
