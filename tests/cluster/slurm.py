"""A real Slurm on hosts of this machine: the last host is the login node and the controller, the others compute."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import HostProcess, Hosts

_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "scontrol", "squeue", "scancel", "srun", "sinfo")

SAVE_SECONDS = 30
"""What Slurm grants a job between a signal and its end: the tiny model's checkpoint, on a busy machine."""

_SETTINGS = {
    "ClusterName": "test",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    # No cgroups, no accounting: nothing of the machine's own is touched.
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    # A node that was off may be used again as soon as its daemon says so.
    "ReturnToService": "2",
    # The hosts share two cores and say that each has two.
    "SlurmdParameters": "config_overrides",
    "CompleteWait": "0",
    "KillWait": str(SAVE_SECONDS),
    # A host that is off is noticed after 10 s without a word, and its job requeued some 10 s later.
    "SlurmdTimeout": "10",
    "PropagateResourceLimits": "NONE",
}


class Slurm:
    """Daemons on `hosts` while the context lasts. Partition `main` is the default, `high` preempts it.

    Args:
        hosts: two or more, on.
        folder: takes the daemons' logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts, self._logs = hosts, folder.resolve()
        self._controller = hosts.count
        self.nodes = [i for i in hosts.all() if i != self._controller]
        self._daemons: dict[str, HostProcess] = {}

    @staticmethod
    @functools.cache
    def available() -> str | None:
        """Why this machine cannot run it, or None if it can."""
        if missing := [name for name in (*_DAEMONS, *_COMMANDS) if shutil.which(name, path=_path()) is None]:
            return f"Slurm is not installed: {', '.join(missing)} missing (tests/cluster/install.sh)"
        return Hosts.available()

    def __enter__(self) -> Slurm:
        # Not below a test's folder: a step's socket must have a short path.
        self._state = tempfile.TemporaryDirectory(prefix="slurm-")
        try:
            self._configure(Path(self._state.name))
            self._start(self._controller, "munged", "--foreground", "--force", *self._munge)
            self._start(self._controller, "slurmctld", "-D", "-c", "-f", str(self._conf))
            for i in self.nodes:
                self.start_node(i)
            _wait(lambda: self._idle() == len(self.nodes), "idle node on every host", self._said)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Nodes last: a controller that sees its nodes go would note it on disk, where nobody will read it.
        for process in self._daemons.values():
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        self._state.cleanup()

    def _configure(self, state: Path) -> None:
        state.chmod(0o755)
        self._logs.mkdir(parents=True, exist_ok=True)
        key, socket = state / "munge.key", state / "munge.socket"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self._munge = [f"--key-file={key}", f"--socket={socket}", f"--pid-file={state / 'munged.pid'}"]
        self._munge += [f"--log-file={self._logs / 'munged.log'}", f"--seed-file={state / 'munge.seed'}"]
        settings = _SETTINGS | {
            "SlurmctldHost": f"{self._hosts.name(self._controller)}({self._hosts.address(self._controller)})",
            # How long a requeued job waits before it may start again: 120 s unless told.
            "AuthInfo": f"socket={socket},cred_expire=5",
            "StateSaveLocation": str(state / "controller"),
            "SlurmdSpoolDir": str(state / "%n"),
            "SlurmctldPidFile": str(state / "slurmctld.pid"),
            "SlurmdPidFile": str(state / "slurmd-%n.pid"),
            "SlurmctldLogFile": str(self._logs / "slurmctld.log"),
            "SlurmdLogFile": str(self._logs / "slurmd-%n.log"),
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={self._hosts.name(i)} NodeAddr={self._hosts.address(i)} CPUs=2 RealMemory=4000 State=UNKNOWN"
            for i in self.nodes
        ]
        lines += [
            f"PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime={SAVE_SECONDS}",
            "PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF",
        ]
        self._conf = state / "slurm.conf"
        self._conf.write_text("\n".join(lines) + "\n")

    def _start(self, i: int, daemon: str, *arguments: str) -> None:
        name = f"{daemon}-{self._hosts.name(i)}"
        with (self._logs / f"{name}.out").open("ab") as output:
            self._daemons[name] = self._hosts.start(
                i,
                [shutil.which(daemon, path=_path()) or daemon, *arguments],
                cwd="/",
                env={"PATH": _path()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def start_node(self, i: int) -> None:
        """The daemon of a compute host, as its boot would."""
        self._start(i, "slurmd", "-D", "-N", self._hosts.name(i), "-f", str(self._conf))

    def _idle(self) -> int:
        done = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return len(done.stdout.split())

    def _said(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(f"----- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self._logs.iterdir()))

    def run(self, *command: str | Path, check: bool = True, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        environment = {**keywords.pop("env", os.environ), "SLURM_CONF": str(self._conf)}
        done = self._hosts.run(self._controller, list(command), env=environment, **keywords)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: str | Path, **keywords: Any) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **keywords).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says about a job (an array's task is JOB_TASK)."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, job: str, states: Sequence[str], seconds: float = 240.0) -> dict[str, str]:
        """Until the job is in one of `states`; what Slurm says about it then."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.show(job))
            return found["JobState"] in states

        _wait(there, f"state {' or '.join(states)}", lambda: f"{found}\n{self._said()}", seconds)
        return found


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def _wait(condition: Callable[[], bool], what: str, said: Callable[[], str], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s: {said()}"
        time.sleep(0.2)
