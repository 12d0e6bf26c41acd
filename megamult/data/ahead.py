"""Building of an epoch's index files, which determine the order of its samples, before a run needs the epoch.

A background process of each rank builds those of the sources that are its own. Without it, all ranks would wait while
ranks build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megamult.data.epochs import EpochFiles, to_json
from megamult.runtime.partial import is_being_written


class BuildsAhead:
    """Builder of the index files of epochs. One background process at a time builds them, in the order given.

    Megatron's builder holds the interpreter's lock, so building in a thread would stop training meanwhile. The
    background process ends when this process ends, even if this process is killed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (open while this object exists)
        self._given: set[Path] = set()

    @property
    def busy(self) -> bool:
        """Whether the background process is still running."""
        return self._process is not None and self._process.poll() is None

    def start(self, epochs: Sequence[tuple[EpochFiles, int]]) -> None:
        """Start to build the index files of `epochs`, skipping epochs of earlier calls and epochs whose files exist.

        `busy` must be False.
        """
        assert not self.busy
        self._end()
        new = [(files, n) for files, n in epochs if files.path(n) not in self._given and not files.path(n).exists()]
        self._given |= {files.path(n) for files, n in new}
        if not new:
            return
        # The new process must find the package even if a user's script found it by changing sys.path.
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryFile("w+", encoding="utf-8") as work:
            work.writelines(f"{to_json(files, n)}\n" for files, n in new)
            work.flush()
            work.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megamult.data.epochs", str(work.fileno())],
                stdin=subprocess.PIPE,  # never written to: it closes if this process ends, and that ends the child
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(work.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
            )

    def wait_for(self, files: EpochFiles, epoch: int) -> None:
        """Wait until an epoch's index files are complete, or the background process that is writing them has ended.

        If the epoch is still queued, return at once, because this process can build it sooner.
        """
        path = files.path(epoch)
        while path in self._given and self.busy and not path.exists() and is_being_written(path):
            time.sleep(0.05)
        if not self.busy:
            self._end()

    def close(self) -> None:
        """End the background process, if there is one. Epochs that it has not built are built when a run needs them."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def _end(self) -> None:
        """Wait for the process to end, and warn if it failed. Epochs that it has not built are built when needed."""
        if self._process is None:
            return
        code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None
        if code:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            print(
                f"warning: indices of coming epochs could not be built ahead ({last}): they are built when they are "
                "needed, and training waits for them",
                file=sys.stderr,
                flush=True,
            )
        self._errors.seek(0)
        self._errors.truncate()
