"""One live run to a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from megamult import environment

LOCK = "lock"

PATIENCE_SECONDS = 120.0
"""An earlier part of the run may still be saving, or its file server may not have noticed yet that its node is down."""


class RunLock:
    """`lock` in a run directory, held by rank 0 as long as its process lives, however it ends."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def acquire(self, run_dir: Path) -> bool:
        """Hold it, once; wait for a while if another run does, and return whether one did.

        Raises:
            ValueError: another run still does.
        """
        if self._file is not None:
            return False
        file = (run_dir / LOCK).open("a+", encoding="utf-8")
        deadline, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if time.monotonic() > deadline:
                    file.close()
                    raise ValueError(
                        f"train.run_dir {run_dir} belongs to a run that is alive ({holder}): end it, or choose another "
                        f"with --train.run_dir. If there is no such process any more (its node is gone, and the file "
                        f"server keeps its lock), remove {run_dir / LOCK}"
                    ) from None
                if not told:
                    told = True
                    print(f"waiting until an earlier run leaves {run_dir} ({holder})", flush=True)
                time.sleep(0.5)
            except OSError as error:
                print(f"warning: {run_dir} cannot be locked ({error}): see that no other run uses it", file=sys.stderr)
                break
        file.truncate(0)
        file.write(json.dumps({"host": environment.host(), "process": os.getpid(), "since": time.strftime("%F %T")}))
        file.flush()
        self._file = file
        return told

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
