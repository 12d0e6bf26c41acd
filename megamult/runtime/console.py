"""What programs say and how they end: one line for a user's mistake, exit codes, cleaning up when asked to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from megamult.distributed import environment
from megamult.runtime import exit_codes


def say_error(message: str) -> None:
    """One line on standard error."""
    print("error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr, flush=True)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end a program with one word of rank 0 and exit code 130, no traceback. It goes around all imports."""
    try:
        yield
    except KeyboardInterrupt:
        if environment.rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


@contextlib.contextmanager
def whole_or_nothing() -> Iterator[None]:
    """Run a program's work, which writes nothing unless it ends in order. ValueError and OSError are a user's mistake
    (exit code 2), Ctrl-C is 130; SIGTERM (143) and the terminal's end (SIGHUP, 129) clean up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it is ignored, and shall be
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
