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
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megamult import environment

_OWNER = "owner"


@contextlib.contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to write it in; removed at the end with what is still in it.

    First it removes folders for the same `final` that dead processes left, and says so on standard error. What belongs
    to a process of another machine, or to nobody that can be known, stays, with a line that names it.
    """
    _remove_leftovers(final)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        with open(folder / _OWNER, "x", encoding="utf-8") as owner:
            # The lock comes before the text: a file with text that is not locked is a dead process's.
            _lock(owner)
            json.dump({"machine": environment.machine(), "host": environment.host(), "process": os.getpid()}, owner)
            owner.flush()
            contents = folder / "contents"
            contents.mkdir()
            yield contents
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(owner: IO[str]) -> bool:
    """Take the lock; whether it was free. A file system without locks gives it to everybody."""
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"warning: {owner.name} cannot be locked ({error.strerror})", file=sys.stderr)
    return True


def unfinished(final: Path) -> list[Path]:
    """The partial folders for `final` that are there, of the living and of the dead."""
    found = final.parent.glob(f".{_escaped(final.name)}.*.partial")
    # What follows NAME must be mkdtemp's eight characters: `.a.b.x.partial` belongs to `a.b`, not to `a`.
    ours = [path for path in found if "." not in path.name.removeprefix(f".{final.name}.").removesuffix(".partial")]
    return sorted(path for path in ours if path.is_dir())


def _remove_leftovers(final: Path) -> None:
    for folder in unfinished(final):
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
            if not _lock(file):
                return None
            owner = json.loads(file.read())
            machine, host, process = owner["machine"], owner["host"], owner["process"]
    except (OSError, ValueError, KeyError, TypeError):
        # No record, or none yet: it was made this moment, or by a version that kept none.
        print(doubt, file=sys.stderr)
        return None
    if machine == environment.machine():
        return f"process {process}"
    if host == environment.host():
        return f"process {process}, before this machine was started anew,"
    # Locks of many file systems are known on one node only.
    print(f"{doubt} (process {process} on {host})", file=sys.stderr)
    return None
