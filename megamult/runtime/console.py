"""Console output and exit of programs: one-line errors for users' mistakes, exit codes, and clean-up on signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from megamult.distributed import environment
from megamult.runtime import exit_codes


def say_error(message: str) -> None:
    """Print an error as one line on standard error."""
    print("error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr, flush=True)


def reason_of(error: BaseException) -> str:
    """Return the text of an error on one line, or the name of its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, sorted and with ranges: "0-2, 5" for [0, 1, 2, 5]."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C end the program with exit code 130, without a traceback. Rank 0 prints "interrupted".

    Enter this context before slow imports, so that it covers them too.
    """
    try:
        yield
    except KeyboardInterrupt:
        if environment.rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


@contextlib.contextmanager
def whole_or_nothing() -> Iterator[None]:
    """Run a program that must write nothing unless it succeeds, and exit with the code of its failure if it fails.

    ValueError and OSError count as the user's mistake (exit code 2). On Ctrl-C, SIGTERM and SIGHUP (sent when
    the terminal closes), the program cleans up and exits with code 130, 143 or 129.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup makes programs ignore it
        signal.signal(signal.SIGHUP, _terminate)
    try:
        yield
    except (ValueError, OSError) as error:
        say_error(str(error))
        sys.exit(exit_codes.USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP for a moment in which work must not be left half done.

    In other threads than the main one it does nothing, because signals interrupt only the main thread's Python code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)
