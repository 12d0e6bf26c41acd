"""Hidden folders that hold results until they are complete, and removal of folders that killed processes left behind.

A folder `.NAME.RANDOM.partial` belongs to the process that holds the lock on the file `owner` in it. However
the process ends, the kernel releases the lock. A folder of this machine that is not locked therefore belongs to a dead
process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megamult.distributed import environment

_OWNER = "owner"


@contextlib.contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`, in which to write the contents of `final`. The caller renames this
    folder, or the files in it, to the final names. At the end, remove everything that the caller has not renamed.

    Folders for the same `final` that dead processes left are removed first, and a line on standard error names each. A
    folder stays, and a line names it, if it cannot be told whether its process still lives. This is so for a folder of
    another machine, of this machine before a reboot, or of an unknown process, and for every folder if the file system
    has no locks.
    """
    _remove_leftovers(final)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        with open(folder / _OWNER, "x", encoding="utf-8") as owner:
            # Lock the file before writing its text, so that a file with text and no lock belongs to a dead process. If
            # another process has locked it first, that process only checks it, and releases it at once.
            while _lock(owner) is False:
                time.sleep(0.01)
            json.dump({"machine": environment.machine(), "host": environment.host(), "process": os.getpid()}, owner)
            owner.flush()
            contents = folder / "contents"
            contents.mkdir()
            yield contents
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(owner: IO[str]) -> bool | None:
    """Take the lock, and return whether it was free, or None if this file system has no locks."""
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_being_written(final: Path) -> bool:
    """Return whether a process is writing `final` in a partial folder now, as far as the folder's lock tells.

    Many file systems show a lock on one machine only, and some have none: False does not mean that nobody writes.
    """
    for folder in _unfinished(final):
        with contextlib.suppress(OSError), open(folder / _OWNER, "r+", encoding="utf-8") as file:
            if _lock(file) is False:
                return True
    return False


def _unfinished(final: Path) -> list[Path]:
    """List the partial folders for `final`, of live and of dead processes."""
    found = final.parent.glob(f".{_escaped(final.name)}.*.partial")
    # Only mkdtemp's eight characters may follow NAME: `.a.b.x.partial` belongs to `a.b`, not to `a`.
    ours = [path for path in found if "." not in path.name.removeprefix(f".{final.name}.").removesuffix(".partial")]
    return sorted(path for path in ours if path.is_dir())


def _remove_leftovers(final: Path) -> None:
    for folder in _unfinished(final):
        owner = _dead_owner(folder)
        if owner is not None:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"removed {folder}, which {owner} left unfinished", file=sys.stderr)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _dead_owner(folder: Path) -> str | None:
    """Return a description of the dead process that a folder belonged to, or None if the process is not known to be
    dead."""
    doubt = (
        f"{folder} is unfinished, and this process cannot tell whether its writer still runs: if not, remove the folder"
    )
    try:
        with open(folder / _OWNER, "r+", encoding="utf-8") as file:
            free = _lock(file)
            if free is False:
                return None
            owner = json.loads(file.read())
            machine, host, process = owner["machine"], owner["host"], owner["process"]
    except (OSError, ValueError, KeyError, TypeError):
        # The folder has no record: it was made a moment ago, or an older version of megamult made it.
        print(doubt, file=sys.stderr)
        return None
    if free and machine == environment.machine():
        return f"process {process}"
    # Many file systems show a lock on one node only, and two machines may have the same name.
    print(f"{doubt} (its writer is process {process} on {host})", file=sys.stderr)
    return None
