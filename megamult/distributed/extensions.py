"""Locks in torch's cache of compiled extensions: wait for locks that are held, remove locks whose process has ended.

While torch compiles an extension, the extension's folder holds a file ``lock``, and every other process waits until the
file is removed. If the process that made the file was killed, the others wait for ever. On CPUs every run loads
DeepSpeed's shared-memory collectives from this cache, so without this module such a lock would stop every run at its
start.

The module imports only the standard library and nothing of the package, so that launch/setup_env.sh can run it before
anything is installed: ``python megamult/distributed/extensions.py FOLDER``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 120.0
"""Seconds that a locked folder must stay unchanged before its lock is removed. A lock that a process of this machine
holds is never removed. A compiler on another machine or in another container cannot be seen from here, but it would
write files to the folder more often than this."""

LIMIT = 300.0
"""Seconds to wait for a lock that a process of this machine holds. Compiling an extension takes half a minute."""


def build_root() -> Path:
    """Return the folder of torch's compiled extensions: TORCH_EXTENSIONS_DIR, or torch's default."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def release(
    root: Path,
    say: Callable[[str], None],
    name: str = "*",
    waits_aloud: bool = True,
    patience: float = PATIENCE,
    limit: float = LIMIT,
) -> None:
    """Wait until no extension below `root` is locked, and remove the locks of processes that have ended.

    Args:
        root: folder of the cache. Each extension has its own folder, one or two levels below.
        say: function that shows one line to the user.
        name: glob pattern for the names of the extensions whose locks are checked.
        waits_aloud: whether to say for which lock this process waits; false if another rank of the node says it.
        patience: seconds that a folder must stay unchanged before its lock is removed (see `PATIENCE`).
        limit: longest time in seconds to wait for a lock that a process of this machine holds (see `LIMIT`).

    Raises:
        TimeoutError: a live process of this machine has held a lock for longer than `limit`.
    """
    for pattern in (f"{name}/lock", f"*/{name}/lock"):
        for lock in sorted(root.glob(pattern)):
            _release(lock, say, waits_aloud, patience, limit)


def _release(lock: Path, say: Callable[[str], None], waits_aloud: bool, patience: float, limit: float) -> None:
    began, told = time.monotonic(), not waits_aloud
    holders: list[int] = []
    while True:
        # One process at a time checks and removes, so that none removes a new lock that a faster process has made.
        with _guarded(lock.parent), contextlib.suppress(FileNotFoundError):
            holders, quiet = _holders(lock), time.time() - _last_change(lock)
            if not holders and quiet > patience:
                lock.unlink()
                say(f"removed {lock}: the process that made it has ended")
        if not lock.exists():
            return
        if holders and time.monotonic() - began > limit:
            raise TimeoutError(
                f"{lock} has been held by {_name(holders[0])} for more than {limit:.0f} s: wait until that process "
                "has finished compiling, or end it, or set TORCH_EXTENSIONS_DIR to another folder"
            )
        if not told:
            by = f"{_name(holders[0])} is" if holders else "another machine may be"
            say(f"waiting until {lock} is gone: {by} compiling the extension in this folder")
            told = True
        time.sleep(0.5)


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holders(lock: Path) -> list[int]:
    """Return the ids of the processes of this machine that seem to compile in a lock's folder.

    They are the process that has the lock open, and those whose working directory is the folder, as ninja's is.
    """
    found = []
    for pattern, target in (("[0-9]*/fd/*", lock), ("[0-9]*/cwd", lock.parent)):
        for link in Path("/proc").glob(pattern):
            with contextlib.suppress(OSError):  # the process has ended, or may not be read
                if os.path.samefile(link, target):
                    found.append(int(link.parts[2]))
    return [process for process in found if process != os.getpid()]


def _last_change(lock: Path) -> float:
    """Return the time of the latest write to any file in the locked folder, in seconds since the epoch.

    Raises:
        FileNotFoundError: the lock has been removed.
    """
    newest = lock.stat().st_mtime
    for file in lock.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, file.stat().st_mtime)
    return newest


def _name(process: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f"process {process} ({words.strip()[:80]})"
    return f"process {process}"


if __name__ == "__main__":
    try:
        release(Path(sys.argv[1]), lambda line: print(f"megamult: {line}", file=sys.stderr))
    except TimeoutError as error:
        sys.exit(f"megamult: error: {error}")
