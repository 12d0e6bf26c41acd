"""Commands that run side by side. A signal to this process makes them save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The repository, in which commands run."""

_PATIENCE_SECONDS = 60.0
"""Seconds to wait for all processes of an interrupted command to end. Ranks have 30 s to write their checkpoint."""

_POLL_SECONDS = 0.05


class Interrupted(Exception):
    """A signal asked this program to stop."""


class Children:
    """Commands that run side by side, each with its processes in a group of its own.

    SIGTERM and SIGINT to this process are passed on as SIGTERM, which makes a run save a checkpoint. To be used as a
    context, on the main thread.

    Attributes:
        asked: whether this process got one of these signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Children:
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._running:  # only if an exception has ended the caller's loop
            _signal_group(child.pid, signal.SIGTERM)
            child.wait()
            _wait_for_group(child.pid)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __len__(self) -> int:
        return len(self._running)

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command that appends its output to `log`.

        Args:
            command: program and arguments.
            log: file for standard output and standard error.
            environment: variables to add to those of this process.

        Raises:
            Interrupted: this process has been asked to stop.
        """
        if self.asked:
            raise Interrupted
        with log.open("ab") as said:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(child)
        if self.asked:  # the signal came while the command was starting, and has not reached it
            _signal_group(child.pid, signal.SIGTERM)
        return child

    def wait(self) -> subprocess.Popen[bytes]:
        """Wait until one of the commands has ended, and return it. Some must be running."""
        while True:
            for child in self._running:
                if child.poll() is not None:
                    if self.asked:  # a script may end before its ranks do
                        _wait_for_group(child.pid)
                    self._running.remove(child)
                    return child
            time.sleep(_POLL_SECONDS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for child in self._running:
            _signal_group(child.pid, signal.SIGTERM)


def run(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run one command as :meth:`Children.start` does, and return its exit code.

    Raises:
        Interrupted: this process got a signal. The command has ended.
    """
    with Children() as children:
        children.start(command, log, environment)
        code = children.wait().returncode
        if children.asked:
            raise Interrupted
        return code


def last_lines(log: Path, count: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def _wait_for_group(leader: int) -> None:
    """Wait until no process of a group is left, but not longer than _PATIENCE_SECONDS."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and _signal_group(leader, 0):
        # If this is a container's first process, it becomes the parent of leftover ranks and must reap them.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-leader, os.WNOHANG)
        time.sleep(_POLL_SECONDS)


def _signal_group(leader: int, number: int) -> bool:
    """Send a signal to a process group. Return False if the group has no process left."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True
