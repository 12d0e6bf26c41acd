"""Lock of a run directory, which one live run holds, even on file systems whose locks are known on one node only."""

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
"""Time to wait for an earlier start of the run, which may still be saving, or whose dead node the file server may not
have noticed yet."""

BEAT_SECONDS = 3.0
"""Seconds between the holder's writes to the lock, which show that it is alive."""

LOOKS = 120
"""Reads of the lock, LOOK_SECONDS apart, that must all find it unchanged before a holder on another node counts as
dead. A live holder may be unable to write for as long: shuffling the 2^31 documents that a source may have takes 90 s.
Reads are counted instead of seconds, because a file server that hangs then delays both sides, and no clocks are
compared."""

LOOK_SECONDS = 1.0

SETTLE_SECONDS = 1.0
"""Time after which a run that took over a dead run's lock reads it again. If several runs take it over, the last to
write has it; and if the holder removed the file after this run had opened it, another file has its name now."""


class RunLock:
    """The file `lock` in a run directory, held by rank 0 as long as its process lives, however it ends.

    Two things keep other runs out. The first is flock, which is released the moment the process ends, but which other
    nodes do not see on some file systems. The second is the record in the file, which names the holder and counts its
    beats: every node sees it, but only after a while that a dead holder's count stands still. A run that ends in order
    removes the file.

    Args:
        ending: function that is called before this process ends because another run has the lock.
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
        """Take the lock, unless it is held already. If another run has it, wait for a while; return whether one had it.

        Raises:
            ValueError: another run still has it.
            OSError: the file cannot be written.
        """
        if self._descriptor is not None:
            return False
        self._path = run_dir / LOCK
        deadline, waited = time.monotonic() + PATIENCE_SECONDS, False
        before, looks = None, 0  # the last record, and how many reads in a row found the same
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
                print(f"waiting until an earlier run leaves {run_dir} ({_holder(text)})", flush=True)
            elif before is None and not alive:
                print(f"{self._path} names {_holder(text)}: checking for {LOOKS} s whether that is alive", flush=True)
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
        """Write our own record into the file, and check that no other run has overwritten it."""
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
        """Write every few seconds that this run is alive; end the process if another run has taken the lock over."""
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
    """Return (descriptor, whether the file is new); the descriptor is None if the file was removed meanwhile."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            return None, False


def _flock(descriptor: int, insist: bool) -> bool | None:
    """Lock the file and return whether that worked; None: this file system has no locks.

    Args:
        insist: try until it works. For a file that we made: others lock it only for a moment, to look.
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
    """Return the lock's text; "" if there is none. A file opened anew shows its state on every file system."""
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
    """Tell whether the record's process ran on this node, whose kernel knows its flock. A record of an older version
    has no machine; then the host's name decides."""
    found = _record(text)
    if "machine" in found:
        return bool(found["machine"] == environment.machine())
    return bool(found.get("host") == environment.host())


def _holder(text: str) -> str:
    """Name of the process that holds the lock, for a message."""
    found = _record(text)
    if not found:
        return "an unknown process"
    process, host, since = (found.get(key, "unknown") for key in ("process", "host", "since"))
    return f"process {process} on {host} since {since}"
