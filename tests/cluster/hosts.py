"""Several hosts on one machine: namespaces on a bridge of their own, with names, addresses, sshd and a power switch.

Each host n1, n2, ... has its own network, processes, host name, shared memory, /dev/shm, /run and /etc/hosts; files
elsewhere are the machine's, as on a cluster with shared storage. Nothing of it has a name outside: namespaces are held
by processes, which end when the program that made them does, however it ends. So two instances never meet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NETWORK = "10.77.0"
_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
_SSH_PORT = 22

# The first process of a host. It ends when the pipe on its standard input is closed, and every process of the host
# with it. SIGCHLD is ignored so that orphans leave no zombies.
_FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 0755 /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
echo ready
trap '' CHLD
exec cat >/dev/null
"""


class HostProcess(subprocess.Popen[Any]):
    """A command on a host. Signals reach the command, not the `nsenter` in front of it, which does not pass them on."""

    def send_signal(self, sig: int) -> None:
        deadline = time.monotonic() + 1.0
        while self.poll() is None:
            if children := _children(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(children[0], sig)
                return
            if time.monotonic() > deadline:
                super().send_signal(sig)
                return
            time.sleep(0.01)


class Hosts:
    """`count` hosts n1 .. nN, numbered from 1, while the context lasts. `folder` takes a few small files.

    Raises:
        RuntimeError: a host does not come up.
    """

    def __init__(self, count: int, folder: Path) -> None:
        if not 1 <= count <= 250:
            raise ValueError(f"{count} hosts: 1 to 250 have an address")
        self.count = count
        self._folder = folder.resolve()
        self._switch: subprocess.Popen[bytes] | None = None
        self._holders: dict[int, subprocess.Popen[bytes]] = {}
        self._first: dict[int, int] = {}
        self._started: list[HostProcess] = []
        self._sshd_on: set[int] = set()

    @staticmethod
    @functools.cache
    def available() -> str | None:
        """Why this machine cannot have hosts, or None if it can."""
        if os.geteuid() != 0:
            return "hosts as namespaces need root"
        if missing := [name for name in ("ip", "nsenter", "unshare", "mount") if shutil.which(name) is None]:
            return f"hosts as namespaces need {', '.join(missing)} (tests/cluster/install.sh)"
        probe = "ip link add name br0 type bridge && ip link add name eth0 type veth peer name p1"
        probe += " && mount -t tmpfs tmpfs /dev/shm"
        asked = subprocess.run(
            ["unshare", *_NAMESPACES, "--fork", "sh", "-c", probe], capture_output=True, text=True, check=False
        )
        return f"no namespaces here: {asked.stderr.strip()}" if asked.returncode else None

    def __enter__(self) -> Hosts:
        self._folder.mkdir(parents=True, exist_ok=True)
        names = [f"{self.address(i)} {self.name(i)}" for i in self.all()]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        # With DNS each reverse look-up would wait for an answer from outside, which a host cannot reach.
        (self._folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        try:
            self._switch = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo ready && exec cat >/dev/null"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this program: the context ends the hosts in order
            )
            _wait_until_ready(self._switch, "the switch")
            self._on_switch("link", "add", "br0", "type", "bridge")
            self._on_switch("link", "set", "br0", "up")
            for i in self.all():
                self.power_on(i)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def all(self) -> range:
        """The numbers of all hosts."""
        return range(1, self.count + 1)

    def name(self, i: int) -> str:
        """Host name, which every host resolves."""
        return f"n{i}"

    def address(self, i: int) -> str:
        """IPv4 address."""
        return f"{_NETWORK}.{i}"

    def first_process(self, i: int) -> int:
        """Process id, seen from outside, of the host's PID 1."""
        if i not in self._first:
            raise RuntimeError(f"host {self.name(i)} is off")
        return self._first[i]

    def start(self, i: int, command: Sequence[str | Path], **keywords: Any) -> HostProcess:
        """Popen of `command` on host `i`, with this process's environment and working directory unless given."""
        where = keywords.pop("cwd", None) or Path.cwd()
        # The directory is entered on the host: entered here, it would be a path of the machine's mounts.
        enter = [*self._enter(i), "env", f"--chdir={where}", *map(str, command)]
        process = HostProcess(enter, **keywords)
        self._started.append(process)
        return process

    def run(
        self, i: int, command: Sequence[str | Path], timeout: float = 60.0, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on host `i` to its end, and get its code and what it wrote.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
        """
        process = self.start(
            i, command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **keywords}
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5.0)
            raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def pids(self, i: int) -> dict[int, str]:
        """Process id, seen from outside, -> command line of every process of host `i` but its first; none if off."""
        if i not in self._first:
            return {}
        first = self._first[i]
        found = {}
        with contextlib.suppress(OSError):
            namespace = (Path("/proc") / str(first) / "ns" / "pid").readlink()
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    line = (process / "cmdline").read_bytes()  # empty: a zombie, which has ended
                    if line and (process / "ns" / "pid").readlink() == namespace:
                        found[int(process.name)] = line.replace(b"\0", b" ").decode(errors="replace").strip()
        found.pop(first, None)
        return found

    def power_off(self, i: int) -> None:
        """As if the plug were pulled: no process says goodbye, and the address does not answer."""
        first = self.first_process(i)
        self.cut(i)  # first, so that no connection is closed in order
        self._end_host(i, first)
        with contextlib.suppress(subprocess.CalledProcessError):  # it goes with the host, now or a little later
            self._on_switch("link", "del", f"p{i}")

    def power_on(self, i: int) -> None:
        """Start host `i`, with its sshd if `ssh` had started one there. A host that is on stays as it is."""
        if i in self._first:
            return
        holder = subprocess.Popen(
            [*("unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child"), "sh", "-c", _FIRST_PROCESS, "sh"]
            + [self.name(i), str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self._holders[i] = holder
        _wait_until_ready(holder, f"host {self.name(i)}")
        self._first[i] = _children(holder.pid)[0]
        # A fixed hardware address: peers remember it while the host is off.
        card = ("eth0", "netns", str(self._first[i]), "address", f"02:00:00:00:00:{i:02x}")
        self._on_switch("link", "add", f"p{i}", "type", "veth", "peer", "name", *card)
        self._on_switch("link", "set", f"p{i}", "master", "br0", "up")
        self.ip(i, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
        self.ip(i, "link", "set", "eth0", "up")
        if i in self._sshd_on:
            self._start_sshd(i)

    def cut(self, i: int) -> None:
        """Unplug host `i` from the switch."""
        self._on_switch("link", "set", f"p{i}", "down")

    def heal(self, i: int) -> None:
        """Plug host `i` in again."""
        self._on_switch("link", "set", f"p{i}", "up")

    def ip(self, i: int, *arguments: str) -> None:
        """The `ip` command in the network of host `i`."""
        _ip(self.first_process(i), *arguments)

    def listens(self, i: int, port: int) -> bool:
        """Whether a socket of host `i` waits for connections at `port`, by IPv4 or IPv6."""
        network = Path("/proc") / str(self.first_process(i)) / "net"
        lines = [*(network / "tcp").read_text().splitlines(), *(network / "tcp6").read_text().splitlines()]
        fields = [line.split() for line in lines]
        return any(each[1].endswith(f":{port:04X}") and each[3] == "0A" for each in fields)

    @contextlib.contextmanager
    def ssh(self, on: Sequence[int] | None = None) -> Iterator[Path]:
        """An sshd on each host of `on` (default: all that are on), with keys of its own, while the context lasts.

        Returns:
            The folder to put first in PATH: its `ssh` has the key, and asks nothing.
        """
        folder = self._folder / "ssh"
        folder.mkdir(mode=0o700, exist_ok=True)
        for key in ("user_key", "host_key"):
            if not (folder / key).exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        _write_options(
            folder / "sshd_config",
            {
                "HostKey": folder / "host_key",
                "AuthorizedKeysFile": folder / "user_key.pub",
                "PasswordAuthentication": "no",
                "PermitRootLogin": "prohibit-password",
                "StrictModes": "no",  # the keys' folder may be anybody's
                "UsePAM": "no",
                "UseDNS": "no",
                "PidFile": "none",
                "MaxStartups": "100",
            },
        )
        _write_options(
            folder / "ssh_config",
            {
                "IdentityFile": folder / "user_key",
                "IdentitiesOnly": "yes",
                "StrictHostKeyChecking": "no",
                "UserKnownHostsFile": "/dev/null",
                "LogLevel": "ERROR",
            },
        )
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        client = shlex.quote(shutil.which("ssh") or "/usr/bin/ssh")
        (programs / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {shlex.quote(str(folder / "ssh_config"))} "$@"\n')
        (programs / "ssh").chmod(0o755)
        hosts = set(self._first if on is None else on)
        self._sshd_on |= hosts
        try:
            for i in sorted(hosts):
                self._start_sshd(i)
            yield programs
        finally:
            self._sshd_on -= hosts
            for i in hosts:
                for pid, line in self.pids(i).items():
                    if str(folder / "sshd_config") in line:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGTERM)

    def _start_sshd(self, i: int) -> None:
        listen = f"ListenAddress={self.address(i)}:{_SSH_PORT}"
        config = self._folder / "ssh" / "sshd_config"
        # By its full path: sshd starts itself again for every connection.
        server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "/usr/sbin/sshd"
        process = self.start(i, [server, "-D", "-f", config, "-o", listen], cwd="/", stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 10.0
        while not self.listens(i, _SSH_PORT):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"sshd does not start on {self.name(i)}: {process.communicate()[1]}")
            time.sleep(0.02)

    def _enter(self, i: int) -> list[str]:
        return ["nsenter", "--target", str(self.first_process(i)), *_NAMESPACES, "--"]

    def _on_switch(self, *arguments: str) -> None:
        assert self._switch is not None, "used outside its context"
        _ip(self._switch.pid, *arguments)

    def _end_host(self, i: int, first: int | None) -> None:
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        holder = self._holders.pop(i)
        if first is None:
            holder.kill()
        _close(holder)
        self._first.pop(i, None)

    def _end(self) -> None:
        for i in list(self._holders):
            self._end_host(i, self._first.get(i))
        if self._switch is not None:
            self._switch.kill()
            _close(self._switch)
            self._switch = None
        for process in self._started:  # ended with their hosts: only to leave no zombies
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5.0)


def _ip(pid: int, *arguments: str) -> None:
    """The `ip` command in the network of process `pid`."""
    command = ["nsenter", "--target", str(pid), "--net", "--", "ip", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _children(pid: int) -> list[int]:
    """Process ids of the children of `pid`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # after the command's name, which may hold anything: state, parent, ...
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(process.name))
    return found


def _wait_until_ready(process: subprocess.Popen[bytes], what: str) -> None:
    """Until it has written a line."""
    assert process.stdout is not None
    if process.stdout.readline().strip() != b"ready":
        process.kill()
        raise RuntimeError(f"{what} did not start: exit code {process.wait()}")


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close its pipes and wait for its end."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait(timeout=30.0)


def _write_options(path: Path, options: Mapping[str, str | Path]) -> None:
    path.write_text("".join(f"{key} {value}\n" for key, value in options.items()))
