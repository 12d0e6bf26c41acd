"""Lock of a run directory, which at most one live run holds. It does not need file locks that all nodes can see."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megamult.distributed import environment
from megamult.runtime import exit_codes
from megamult.runtime.console import say_error

LOCK = "lock"

PATIENCE_SECONDS = 120.0
"""Seconds to wait until an earlier start of the run releases the lock. That start may still be saving, or its node may
be dead and the file server may not have noticed yet."""

BEAT_SECONDS = 3.0
"""Seconds between two writes of the holder to the lock file, which show that the holder is alive."""

LOOKS = 120
"""Number of reads of the lock that must all find it unchanged before a holder on another node counts as dead.

The reads take about 120 s. A live holder may be unable to write for nearly that long: shuffling the 2^31 documents
that a source may have takes 90 s. Reads are counted, not seconds, because a file server that hangs delays reads and
writes alike, and because no clocks of different nodes then need to be compared."""

LOOK_SECONDS = 1.0
"""Seconds between two reads of the lock."""

SETTLE_SECONDS = 1.0
"""Seconds after which a run that has taken over a dead run's lock reads the lock again. If several runs have taken it
over, the last one to write holds it. If the earlier holder removed the file after this run had opened it, the path now
leads to another file or to none, and this run does not hold the lock."""


class RunLock:
    """The file `lock` in a run directory, which rank 0 holds until its process ends, in whatever way it ends.

    Two things keep other runs out. The first is flock: the kernel releases it the moment the process ends, but on some
    file systems other nodes do not see it. The second is the record in the file, which names the holder and counts the
    holder's writes: every node sees it, but needs many reads to conclude from an unchanged count that the holder is
    dead. A run that leaves this context removes the file.

    Args:
        ending: function that is called before this process ends because another run has taken the lock.
    """

    def __init__(self, ending: Callable[[], None] = lambda: None) -> None:
        self._ending = ending
        self._descriptor: int | None = None
        self._path = Path()
        self._token = secrets.token_hex(8)
        self._beats = 0
        self._since = time.strftime("%F %T")
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, run_dir: Path) -> bool:
        """Take the lock, unless this run holds it already. Wait up to PATIENCE_SECONDS for another live run to end.

        Returns:
            Whether another live run held the lock at first.

        Raises:
            ValueError: another live run still holds the lock.
            OSError: the file cannot be written.
        """
        if self._descriptor is not None:
            return False
        self._path = run_dir / LOCK
        deadline, waited = time.monotonic() + PATIENCE_SECONDS, False
        before, looks = None, 0  # the last text read, and how many later reads in a row found the same
        while True:
            descriptor, made = _open(self._path)
            if descriptor is None:
                continue
            flocked = _flock(descriptor, insist=made)
            text = _read(self._path)
            ours = made or (flocked is True and _is_here(text))
            looks = looks + 1 if text == before else 0
            if flocked is not False and (ours or looks >= LOOKS):
                if not ours:
                    print(f"{_holder(text)} has not written {self._path} for {LOOKS} s: taking it over", flush=True)
                if self._take(descriptor, settle=not made):
                    return waited
            os.close(descriptor)
            alive = flocked is False or (before is not None and text != before)
            if alive and time.monotonic() > deadline:
                hint = (
                    f". If there is no such process any more (its node is down, and the file server keeps its lock), "
                    f"remove {self._path}"
                )
                raise ValueError(
                    f"train.run_dir {run_dir} belongs to a live run ({_holder(text)}): end it, or choose "
                    f"another with --train.run_dir{hint if flocked is False else ''}"
                )
            if alive and not waited:
                waited = True
                print(f"waiting until an earlier run has left {run_dir} ({_holder(text)})", flush=True)
            elif before is None and not alive:
                print(f"{self._path} names {_holder(text)}: checking for {LOOKS} s whether it is alive", flush=True)
            before = text
            time.sleep(LOOK_SECONDS)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is None:
            return
        assert self._thread is not None
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._token in _read(self._path):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, descriptor: int, settle: bool) -> bool:
        """Write this run's record into the file, and return whether this run now holds the lock.

        Args:
            settle: whether to check after SETTLE_SECONDS that no other run has overwritten the record.
        """
        self._write(descriptor)
        if settle:
            time.sleep(SETTLE_SECONDS)
            if self._token not in _read(self._path):
                return False
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return True

    def _write(self, descriptor: int) -> None:
        record = {
            "host": environment.host(),
            "process": os.getpid(),
            "since": self._since,
            "machine": environment.machine(),
            "token": self._token,
            "beats": self._beats,
        }
        text = (json.dumps(record) + "\n").encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
        os.fsync(descriptor)  # other nodes see only what has reached the file server

    def _beat(self) -> None:
        """Write the record every BEAT_SECONDS, and end this process if another run has taken the lock over."""
        warned = False
        while not self._over.wait(BEAT_SECONDS):
            self._beats += 1
            assert self._descriptor is not None
            try:
                text = _read(self._path)
                if text and self._token not in text:
                    say_error(
                        f"{_holder(text)} has taken {self._path} over, because this run (process {os.getpid()} on "
                        f"{environment.host()}) was held up for over {LOOKS} s or its lock was removed: this run ends"
                    )
                    self._ending()
                    os._exit(exit_codes.WATCHDOG)
                self._write(self._descriptor)
            except OSError as problem:
                if not warned:
                    warned = True
                    print(
                        f"warning: {self._path} cannot be written ({problem.strerror}): another run may take this "
                        "run for dead",
                        file=sys.stderr,
                        flush=True,
                    )


def _open(path: Path) -> tuple[int | None, bool]:
    """Open or create the file, and return (descriptor, whether the file is new).

    The descriptor is None if the file existed, and another process removed it before it was opened."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            return None, False


def _flock(descriptor: int, insist: bool) -> bool | None:
    """Lock the file, and return whether that worked, or None if this file system has no locks.

    Args:
        insist: whether to try until it works. This is meant for a file that this process has created: other processes
            lock such a file only for a moment, to check it.
    """
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not insist:
                return False
            time.sleep(0.01)
        except OSError:
            return None


def _read(path: Path) -> str:
    """Return the text of the lock file, or "" if there is no file. The file is opened anew, because this shows its
    present text on every file system."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _record(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_here(text: str) -> bool:
    """Return whether the record's process ran on this node. If so, this node's kernel knows of that process's flock,
    and a flock that is free means that the process has ended.

    A record of an older version does not have the key `machine`. For such a record the host's name decides."""
    found = _record(text)
    if "machine" in found:
        return bool(found["machine"] == environment.machine())
    return bool(found.get("host") == environment.host())


def _holder(text: str) -> str:
    """Describe the process that holds the lock, for use in messages."""
    found = _record(text)
    if not found:
        return "an unknown process"
    process, host, since = (found.get(key, "unknown") for key in ("process", "host", "since"))
    return f"process {process} on {host} since {since}"
