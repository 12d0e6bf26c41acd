"""A process beside global rank 0's that builds index files before a run needs them, so that no rank waits for them."""

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
    """Builds epochs in the order in which they are given, in one process at a time.

    A process, not a thread: Megatron's builder holds the interpreter's lock, and training would stand still. It ends
    with this one, however this one ends.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as this object)
        self._given: set[Path] = set()

    @property
    def busy(self) -> bool:
        """Whether a process is still at work."""
        return self._process is not None and self._process.poll() is None

    def start(self, epochs: Sequence[tuple[EpochFiles, int]]) -> None:
        """Begin with those that are neither there nor given before; no process may be at work."""
        assert not self.busy
        self._end()
        new = [(files, n) for files, n in epochs if files.path(n) not in self._given and not files.path(n).exists()]
        self._given |= {files.path(n) for files, n in new}
        if not new:
            return
        # What runs may be a script of the user's, from which the package is found by another way.
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryFile("w+", encoding="utf-8") as work:
            work.writelines(f"{to_json(files, n)}\n" for files, n in new)
            work.flush()
            work.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megamult.data.epochs", str(work.fileno())],
                stdin=subprocess.PIPE,  # which nothing is written to: the kernel closes it when this process ends
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(work.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
            )

    def wait_for(self, files: EpochFiles, epoch: int) -> None:
        """Return once the process has built an epoch that it is at. One that it has not come to is not waited for: to
        build that here is faster."""
        path = files.path(epoch)
        while path in self._given and self.busy and not path.exists() and is_being_written(path):
            time.sleep(0.05)
        if not self.busy:
            self._end()

    def close(self) -> None:
        """End the process, if there is one; what it has not built is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def _end(self) -> None:
        """Say if a process has failed: what it was to build is built when it is needed."""
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
