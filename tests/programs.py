"""Python programs that start in a tenth of a second: forked from a process that has imported the heavy libraries.

What `subprocess` does with an interpreter of its own costs eight seconds of imports in every process. Where a test is
not about how a program starts, `run` and `Program` stand in for it: the same arguments, variables, folder, streams,
signals and exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO

from tests.processes import REPOSITORY, free_port, preloaded, starts_processes


class Program:
    """`python ARGUMENTS` as a process of its own, with what is used here of `subprocess.Popen`.

    Args:
        arguments: a script, `-c` and its code, or `-m` and a module; then its arguments.
        env: environment variables; None for this process'. `sitecustomize.py` in a folder of its PYTHONPATH is run.
        cwd: its working directory.
        outputs: pipes for standard output and standard error, which somebody else reads.
        ignored: signals that it ignores from the start; it has the default action for all others.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        outputs: Sequence[Connection] | None = None,
        ignored: Collection[signal.Signals] = (),
    ) -> None:
        starts_processes()
        pipes = [] if outputs else [Pipe(duplex=False) for _ in range(2)]
        writers = list(outputs or [writer for _, writer in pipes])
        variables = dict(os.environ if env is None else env)
        self._process = preloaded().Process(  # type: ignore[attr-defined]
            target=_main, args=([str(each) for each in arguments], variables, str(cwd), writers, list(ignored))
        )
        self._process.start()
        self.pid: int = self._process.pid
        for _, writer in pipes:
            writer.close()
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        if pipes:
            self.stdout, self.stderr = (as_file(reader) for reader, _ in pipes)

    @property
    def returncode(self) -> int | None:
        """Exit code, the negative number of the signal that has ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, once it has ended.

        Raises:
            TimeoutError: it has not within so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
        return self.returncode

    def communicate(self, timeout: float = 180.0) -> tuple[str, str]:
        """Standard output and standard error, once it has ended and nobody can write there."""
        assert self.stdout is not None and self.stderr is not None
        reading = [_Reading(self.stdout), _Reading(self.stderr)]  # both at once: nobody waits for a full pipe
        self.wait(timeout)
        return reading[0].text(timeout), reading[1].text(timeout)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()


class Ranks:
    """A program as `count` ranks of one launch, on one port; None: as one process that no launcher has started.

    Stands for the launcher, whenever it is polled: once a rank has ended with an error, the others get a second to say
    what they know, are asked to end, and are killed five seconds later.
    """

    def __init__(self, arguments: Sequence[str | Path], count: int | None, env: Mapping[str, str]) -> None:
        place = {"MASTER_PORT": str(free_port())}
        pipes = [Pipe(duplex=False) for _ in range(2)]
        self._ranks = []
        for rank in range(count or 1):
            if count is not None:
                place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            self._ranks.append(Program(arguments, {**env, **place}, outputs=[writer for _, writer in pipes]))
        for _, writer in pipes:
            writer.close()
        self._reading = [_Reading(as_file(reader)) for reader, _ in pipes]
        self._failure: tuple[int, float] | None = None
        self._asked = False
        self.pid = self._ranks[0].pid

    @property
    def groups(self) -> set[int]:
        """Process groups of the ranks: the process ids with which they have started."""
        return {rank.pid for rank in self._ranks}

    @property
    def returncode(self) -> int | None:
        """Exit code of the first rank that was seen to fail, 0 if none has, None while one runs."""
        return self.poll()

    def poll(self) -> int | None:
        """The same; ends the others of a rank that has failed."""
        codes = [rank.poll() for rank in self._ranks]
        if self._failure is None and any(codes):
            self._failure = next(code for code in codes if code), time.monotonic()
        if None not in codes:
            return self._failure[0] if self._failure else 0
        if self._failure:
            alive = [rank for rank, code in zip(self._ranks, codes, strict=True) if code is None]
            since = time.monotonic() - self._failure[1]
            if since > 1.0 and not self._asked:
                self._asked = True
                for rank in alive:
                    rank.send_signal(signal.SIGTERM)
            elif since > 6.0:
                for rank in alive:
                    rank.kill()
        return None

    def communicate(self, timeout: float = 180.0) -> tuple[str, str]:
        """What all ranks wrote to standard output and standard error, once they have ended.

        Raises:
            TimeoutError: they have not within so many seconds; they are killed.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                for rank in self._ranks:
                    rank.kill()
                raise TimeoutError(f"ranks have not ended within {timeout:.0f} s")
            time.sleep(0.02)
        return self._reading[0].text(10.0), self._reading[1].text(10.0)


def run(
    arguments: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    timeout: float = 180.0,
    ignored: Collection[signal.Signals] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run(..., capture_output=True, text=True)` does.

    Raises:
        TimeoutError: it has not ended within so many seconds; it is killed.
    """
    program = Program(arguments, env, cwd, ignored=ignored)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.kill()
    assert program.returncode is not None
    return subprocess.CompletedProcess([str(each) for each in arguments], program.returncode, stdout, stderr)


def as_file(reader: Connection) -> IO[str]:
    """The end of a pipe that is read, as text."""
    return os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")


class _Reading:
    """What comes out of a pipe, read as it comes."""

    def __init__(self, file: IO[str]) -> None:
        self._text = ""
        self._file = file
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._file:
            self._text = self._file.read()

    def text(self, timeout: float) -> str:
        """All of it, once nobody can write there.

        Raises:
            TimeoutError: somebody still can after so many seconds.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"a pipe is still open after {timeout:.0f} s")
        return self._text


def _main(
    arguments: list[str], variables: dict[str, str], cwd: str, outputs: list[Connection], ignored: list[signal.Signals]
) -> None:
    """Become the program: everything that an interpreter sets up before it runs one."""
    os.setpgid(0, 0)  # its descendants are found by it
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
    for output in outputs:
        output.close()
    # A shell starts its background jobs, and so the tests in one, with SIGINT ignored.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        action = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else action)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    random.seed()
    atexit.unregister(os._exit)  # the server's
    paths = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    if "PYTHONWARNINGS" not in variables:
        _warn_as_by_default()
    for path in paths:
        if (custom := Path(path) / "sitecustomize.py").exists():
            runpy.run_path(str(custom))
    code: int | str | None = 0
    try:
        _run(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code or 0)


def _run(arguments: list[str]) -> None:
    """Run a script, code or a module as `__main__`."""
    first, *others = arguments
    if first == "-m":
        sys.argv = others
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _warn_as_by_default() -> None:
    """Undo PYTHONWARNINGS of the tests, with which the server has started."""
    warnings.resetwarnings()
    for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
