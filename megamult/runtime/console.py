"""Output and ends of programs: one line for a user's mistake, exit codes, cleaning up when asked to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from megamult.distributed import environment
from megamult.runtime import exit_codes


def say_error(message: str) -> None:
    """Print an error as one line on standard error."""
    print("error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr, flush=True)


def ranges(numbers: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end a program with one word from rank 0 and exit code 130, no traceback. Enter it before imports."""
    try:
        yield
    except KeyboardInterrupt:
        if environment.rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


@contextlib.contextmanager
def whole_or_nothing() -> Iterator[None]:
    """Run a program and return its exit code. The program must write nothing unless it succeeds.

    ValueError and OSError count as the user's mistake (2). At Ctrl-C (130), SIGTERM (143) and SIGHUP, the end of the
    terminal (129), the program cleans up before it exits.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup sets it to be ignored; keep that
        signal.signal(signal.SIGHUP, _terminate)
    try:
        yield
    except (ValueError, OSError) as error:
        say_error(str(error))
        sys.exit(exit_codes.USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


def _terminate(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)
