"""Requests to save and stop a run: signals, the launcher's end, a time limit. All ranks stop after the same step."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from megamult.distributed import environment, launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that schedulers send, and SIGINT, which ranks get from the terminal (Ctrl-C) or from their launcher. If ranks
received different signals, the first of these in this list is the run's reason to stop."""

_ABANDONED = 255
"""Number used in place of a signal's number if a launcher above this rank has ended."""

SAME_REQUEST_SECONDS = 5.0
"""Seconds after the first signal within which further signals belong to the same request: a scheduler sends a signal to
every process of a job, and launchers also pass it on to their ranks."""


class StopRequests:
    """Context that receives requests to stop. The first signal is only recorded. Another one ends the process at
    once, if it comes more than SAME_REQUEST_SECONDS after the first.

    A thread reads the signals from a pipe, to which Python's own C handler writes. A later signal therefore ends the
    process even if the main thread hangs in a collective.

    Some launchers end on a signal without passing it on, so the end of a launcher above this rank counts as a
    request too.

    Args:
        deadline: value of `time.monotonic()` after which this rank asks to stop, or None for no deadline.
        ending: function that is called before a later signal ends the process.
    """

    def __init__(self, deadline: float | None = None, ending: Callable[[], None] = lambda: None) -> None:
        self._deadline, self._ending = deadline, ending
        self._asked = 0  # the first signal's number, or _ABANDONED
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # If SIGINT is ignored, as in a script's background jobs, it stays ignored. A scheduler's signals are received
        # even if they are ignored now: a launcher that must survive them is started with them ignored, and its
        # ranks inherit this.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        heard = [number for number in SIGNALS if number != signal.SIGINT or not ignored]
        self._before = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._launchers: list[int] = []
        for process in launcher.launchers():
            with contextlib.suppress(OSError, AttributeError):  # it has ended, or Python lacks pidfd_open
                self._launchers.append(os.pidfd_open(process))
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # After a request, ignore signals: the same request may arrive again while the process ends.
            signal.signal(number, signal.SIG_IGN if self._asked else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # ends the thread
        self._thread.join()
        for descriptor in (self._reader, *self._launchers):
            os.close(descriptor)

    def _watch(self) -> None:
        first = 0.0
        waiting = select.poll()
        for descriptor in (self._reader, *self._launchers):
            waiting.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in waiting.poll():
                if descriptor != self._reader:
                    waiting.unregister(descriptor)
                    number = _ABANDONED
                elif received := os.read(self._reader, 1):
                    number = received[0]
                else:
                    return
                now = time.monotonic()
                if number not in (*SIGNALS, _ABANDONED):
                    continue
                if not self._asked:
                    self._asked, first = number, now
                    if environment.rank() == 0 and number != _ABANDONED:
                        name = signal.Signals(number).name
                        print(
                            f"{name}: saving at the next step boundary; another signal more than "
                            f"{SAME_REQUEST_SECONDS:.0f} s from now ends this process at once",
                            file=sys.stderr,
                            flush=True,
                        )
                elif now - first > SAME_REQUEST_SECONDS and number != _ABANDONED:
                    self._ending()
                    os._exit(128 + number)

    def ballot(self) -> list[float]:
        """Return this rank's votes on stopping now: for each possible reason, 1 if this rank has that reason, else 0.

        The votes are summed over ranks together with the loss, in fp32, which is exact for up to 2^24 ranks. The sums
        are the argument of :meth:`decided`.
        """
        late = self._deadline is not None and time.monotonic() >= self._deadline
        asked = self._asked
        return [float(asked == number) for number in (_ABANDONED, *SIGNALS)] + [float(late)]

    @staticmethod
    def decided(votes: Sequence[float]) -> str | None:
        """Return the reason for all ranks to stop now, or None if no rank was asked to stop.

        Args:
            votes: sums of all ranks' votes. They are the same on all ranks, and so is the result.
        """
        reasons = ["the launcher has ended", *(number.name for number in SIGNALS), "train.max_minutes"]
        return next((reason for reason, count in zip(reasons, votes, strict=True) if count), None)
