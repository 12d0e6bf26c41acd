"""Logs of ranks: one file for each rank, and rank 0's output also on the screen.

A file rank_N.running exists while rank N runs, and stays if the rank is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO

from megamult import noise
from megamult.distributed import environment


class _Patient(io.TextIOBase):
    """Text file whose write errors, such as a full disk, are ignored: the text is lost, and the program goes on."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class _Both(io.TextIOBase):
    """Stream to both the screen and a file. Text that redraws a line, like a progress bar, goes to the screen only."""

    def __init__(self, screen: IO[str], file: IO[str]) -> None:
        self._screen, self._file = screen, _Patient(file)

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._file.write(text)
        return self._screen.write(text)

    def flush(self) -> None:
        self._screen.flush()

    def isatty(self) -> bool:
        return self._screen.isatty()

    def fileno(self) -> int:
        return self._screen.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class RankLog:
    """Context that directs this process's output and errors. They go to the screen until :meth:`open` is called.

    Then what Python prints on rank 0 goes to the screen and to a file, except lines that are overwritten, such as
    progress bars. What C libraries print there goes to the screen only. Everything that other ranks print goes to a
    file only. So does noise (:mod:`megamult.noise`), that of the time before :meth:`open` included.
    """

    def __enter__(self) -> RankLog:
        self._before = sys.stdout, sys.stderr
        self._screen: list[int] = []
        self._file: IO[str] | None = None
        self._mark: Path | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        noise.log_to(None)
        if error is not None and not isinstance(error, SystemExit):
            self.say("".join(traceback.format_exception(kind, error, trace)).rstrip(), on_screen=False)
        faulthandler.disable()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        self.ended()
        for number, screen in zip((1, 2), self._screen, strict=False):
            os.dup2(screen, number)
            os.close(screen)
        sys.stdout, sys.stderr = self._before
        with contextlib.suppress(OSError):
            self._file.close()

    def open(self, folder: Path) -> None:
        """Append all output from now on to `folder`/rank_N.log.

        The file `folder`/rank_N.running is the mark of this process: it names the process, and exists while the process
        lives. A killed process leaves its mark behind, so the next start of the run can tell which ranks were killed.

        Raises:
            OSError: a file cannot be written.
        """
        folder.mkdir(exist_ok=True)
        path = folder / f"rank_{environment.rank()}.log"
        self._file = path.open("a", encoding="utf-8", buffering=1)
        faulthandler.enable(self._file)
        self._mark = path.with_suffix(_RUNNING)
        self._mark.write_text(f"rank {environment.rank()} on {environment.host()} (process {os.getpid()})\n")
        noise.log_to(lambda text: self.say(text, on_screen=False))
        if environment.rank() == 0:
            sys.stdout, sys.stderr = _Both(sys.stdout, self._file), _Both(sys.stderr, self._file)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._screen = [os.dup(1), os.dup(2)]
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)
        sys.stdout, sys.stderr = _Patient(self._file), _Patient(self._file)

    def say(self, line: str, on_screen: bool) -> None:
        """Write a line to the file. Write it to the screen if `on_screen` is true or there is no file.

        Any thread may call this method.
        """
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.write(self._file.fileno(), f"{line}\n".encode())
            if on_screen or self._file is None:
                os.write(self._screen[1] if self._screen else 2, f"{line}\n".encode())

    def ended(self) -> None:
        """Remove this process's .running file, because the process is about to end and has said why.

        Any thread may call this method.
        """
        if self._mark is not None:
            with contextlib.suppress(OSError):
                self._mark.unlink()


_RUNNING = ".running"
"""Suffix of the files that killed processes leave behind (see :meth:`RankLog.open`)."""


def left_without_a_word(folder: Path) -> list[str]:
    """Return the names of the processes that were killed in earlier starts of the run, sorted by rank.

    Each of them left a .running file behind. These files are removed.
    """
    marks = list(folder.glob(f"rank_*{_RUNNING}"))
    names = {}
    for mark in sorted(marks, key=lambda each: (len(each.name), each.name)):
        with contextlib.suppress(FileNotFoundError):
            names[mark] = mark.read_text(encoding="utf-8").strip()
            mark.unlink()
    return list(names.values())
