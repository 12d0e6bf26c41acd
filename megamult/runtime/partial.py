"""Hidden folders in which results are written until they are complete, and what processes that were killed left there.

A folder `.NAME.RANDOM.partial` belongs to the process that holds the lock on the file `owner` in it. The kernel gives a
lock back however its process ends, so a folder of this machine that nobody holds is a dead process's.
"""

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
    """An empty folder beside `final` to write it in; removed at the end with what is still in it.

    First it removes folders for the same `final` that dead processes left, and says so on standard error. A folder of
    another machine, of this one before it was started anew, or of nobody that can be known stays, with a line that
    names it; so does every folder on a file system without locks.
    """
    _remove_leftovers(final)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        with open(folder / _OWNER, "x", encoding="utf-8") as owner:
            # The lock comes before the text: a file with text that is not locked is a dead process's. Who has it locked
            # before us only looks, and leaves at once.
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
    """Take the lock, and return whether it was free; None: this file system has no locks."""
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_being_written(final: Path) -> bool:
    """Whether a process of this machine is writing `final` in a partial folder now."""
    for folder in _unfinished(final):
        with contextlib.suppress(OSError), open(folder / _OWNER, "r+", encoding="utf-8") as file:
            if _lock(file) is False:
                return True
    return False


def _unfinished(final: Path) -> list[Path]:
    """The partial folders for `final` that are there, of the living and of the dead."""
    found = final.parent.glob(f".{_escaped(final.name)}.*.partial")
    # What follows NAME must be mkdtemp's eight characters: `.a.b.x.partial` belongs to `a.b`, not to `a`.
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
    """Name the process that a folder belonged to, if it is known to be dead; None: it lives, or nobody can know."""
    doubt = f"{folder} is unfinished, and whether its process still runs cannot be seen from here: remove it if not"
    try:
        with open(folder / _OWNER, "r+", encoding="utf-8") as file:
            free = _lock(file)
            if free is False:
                return None
            owner = json.loads(file.read())
            machine, host, process = owner["machine"], owner["host"], owner["process"]
    except (OSError, ValueError, KeyError, TypeError):
        # No record, or none yet: it was made this moment, or by a version that kept none.
        print(doubt, file=sys.stderr)
        return None
    if free and machine == environment.machine():
        return f"process {process}"
    # Locks of many file systems are known on one node only, and two machines may have one name.
    print(f"{doubt} (process {process} on {host})", file=sys.stderr)
    return None
