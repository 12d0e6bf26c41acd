"""launch/pretrain.py over several hosts as a user starts it there, under each launcher, and what it left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.cluster.hosts import HostProcess, Hosts
from tests.train.command import REPOSITORY

Launcher = Literal["no_ssh", "pdsh", "torchrun"]

PORT = 29400
"""Each set of hosts has its own network, where no port is taken."""


@dataclass
class Ended:
    """What a job left."""

    codes: dict[int, int]
    """Host -> its launcher's exit code; a signal's number, negative, if that ended it."""
    texts: dict[int, str]
    """Host -> what its launcher and ranks wrote to the screen."""
    seconds: float
    """From `since` (the start, unless told otherwise) until the last process had gone."""

    @property
    def text(self) -> str:
        """Of all hosts, for a failing test's message."""
        return "\n".join(f"----- n{i}, exit code {self.codes[i]}\n{text}" for i, text in self.texts.items())


class Job:
    """A job of `processes` ranks on each host of `on`, laid out for all hosts.

    Args:
        hosts: where; each is a node of the job, in order.
        launcher: `deepspeed` with --no_ssh on each host, `deepspeed` on the first over pdsh and ssh, or `torchrun`.
        arguments: of launch/pretrain.py.
        folder: takes hostfile, .deepspeed_env and what is written to the screen.
        on: hosts to start it on; others are as if nobody had come to start it there. pdsh asks all from the first.
        ssh: the folder of :meth:`Hosts.ssh`; pdsh needs it.
    """

    def __init__(
        self,
        hosts: Hosts,
        launcher: Launcher,
        arguments: list[str],
        folder: Path,
        processes: int = 2,
        on: list[int] | None = None,
        ssh: Path | None = None,
    ) -> None:
        self.hosts = hosts
        folder.mkdir(parents=True, exist_ok=True)
        self._before = {pid for i in hosts.all() for pid in hosts.pids(i)}
        environment = {key: os.environ[key] for key in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR") if key in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # What pdsh takes to the other hosts.
        (folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in environment.items()))
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{hosts.name(i)} slots={processes}\n" for i in hosts.all()))
        if ssh is not None:
            environment["PATH"] = f"{ssh}:{environment['PATH']}"
        started_on = [1] if launcher == "pdsh" else list(on or hosts.all())
        self._output = {i: folder / f"screen_{i}.txt" for i in started_on}
        self.began = time.monotonic()
        self.launchers: dict[int, HostProcess] = {}
        for i in started_on:
            command = [*_command(hosts, launcher, hostfile, i, processes), REPOSITORY / "launch" / "pretrain.py"]
            with self._output[i].open("wb") as output:
                self.launchers[i] = hosts.start(
                    i,
                    [*command, *arguments],
                    cwd=folder,
                    env={**os.environ, **environment},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )

    def processes(self) -> dict[int, str]:
        """Process id -> command line of every process of it on any host."""
        found = {pid: line for i in self.hosts.all() for pid, line in self.hosts.pids(i).items()}
        # sshd's own, one for each connection, are the host's.
        return {pid: line for pid, line in found.items() if pid not in self._before and not line.startswith("sshd")}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that are there."""
        found: dict[int, int] = {}
        for pid, line in sorted(self.processes().items()):
            with contextlib.suppress(OSError):
                variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
                rank = next((each for each in variables if each.startswith(b"RANK=")), None)
                if rank is not None and "pretrain.py" in line:
                    found.setdefault(int(rank.removeprefix(b"RANK=")), pid)
        return found

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; when."""
        os.kill(self.ranks()[rank], number)
        return time.monotonic()

    def text(self) -> dict[int, str]:
        """Host -> what is on its screen by now."""
        return {i: path.read_text(encoding="utf-8", errors="replace") for i, path in self._output.items()}

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Until it holds.

        Raises:
            AssertionError: it does not within `seconds`, or the job has ended; with what is on the screens.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            over = all(process.poll() is not None for process in self.launchers.values())
            if (over and not condition()) or time.monotonic() > deadline:
                raise AssertionError(f"no {what}{' before the job ended' if over else ''}: {self.text()}")
            time.sleep(0.05)

    def wait(self, timeout: float = 180.0, since: float | None = None) -> Ended:
        """Until every process of it has gone, from every host.

        Raises:
            AssertionError: some are left after `timeout` seconds (from now); with their command lines.
        """
        deadline = time.monotonic() + timeout
        while (left := self.processes()) or any(each.poll() is None for each in self.launchers.values()):
            if time.monotonic() > deadline:
                raise AssertionError(f"after {timeout:.0f} s there are still {left}; {self.text()}")
            time.sleep(0.05)
        seconds = time.monotonic() - (self.began if since is None else since)
        codes = {i: process.wait() for i, process in self.launchers.items()}
        return Ended(codes, self.text(), seconds)

    def end(self) -> None:
        """Kill what is left of it."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _command(hosts: Hosts, launcher: Launcher, hostfile: Path, i: int, processes: int) -> list[str | Path]:
    programs = Path(sys.executable).parent
    first, node = hosts.address(1), str(i - 1)
    if launcher == "torchrun":
        nodes = ["--nnodes", str(hosts.count), "--node-rank", node, "--nproc-per-node", str(processes)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-id", "job"]
        return [programs / "torchrun", *nodes, *meeting]
    command: list[str | Path] = [programs / "deepspeed", "--hostfile", hostfile]
    command += ["--master_addr", first, "--master_port", str(PORT)]
    if launcher == "no_ssh":
        command += ["--no_ssh", "--node_rank", node]
    return command


def records(run_dir: Path) -> list[dict[str, float]]:
    """What a run has recorded of its steps, in order."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    every = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written
    return [record for record in every if "loss" in record]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss; a step that is there twice is an error."""
    found: dict[int, float] = {}
    for record in records(run_dir):
        step = int(record["step"])
        assert step not in found, step
        found[step] = record["loss"]
    return found


def newest_checkpoint(run_dir: Path) -> str | None:
    """What `latest` names."""
    path = run_dir / "checkpoints" / "latest"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
