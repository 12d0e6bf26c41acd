"""Requests to save and stop: signals, the launcher's end, a time limit; acted on by all ranks at one step."""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch

from megamult import environment, launcher
from megamult.patience import ON_FILES

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's, and Ctrl-C, which reaches ranks from the terminal or their launcher."""

_ABANDONED = 255
"""In the place of a signal's number: a launcher above this rank is gone."""

_VOTE_TIMEOUT = datetime.timedelta(seconds=1.5 * ON_FILES)
"""A peer may be at work on files; one that is gone is the watchdog's business."""

SAME_REQUEST_SECONDS = 5.0
"""Signals that follow the first one within this time are the same request: a scheduler sends one to every process of a
job, and launchers pass theirs on."""


class StopRequests:
    """Watches for signals while it is entered. The first one is noted, a later one ends the process at once.

    Signals reach a thread through a pipe that Python's own C handler writes to, so a later one ends the process also
    where the main thread waits in a collective for ever.

    Launchers that pass no signal on leave their ranks behind: that one of those above is gone is a request, too.

    Args:
        deadline: of `time.monotonic()`, from which on to stop; None: never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._asked = 0  # the first signal's number, or _ABANDONED
        self._before: dict[signal.Signals, Any] = {}
        # CPU ranks of its own: a vote waits for no GPU, and meets no other collective.
        self._group = torch.distributed.new_group(backend="gloo", timeout=_VOTE_TIMEOUT)

    def __enter__(self) -> StopRequests:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # Ctrl-C that is ignored, as by a script's background jobs, stays so. A scheduler's signals are heard: launchers
        # that must not die of them are started with them ignored, and their ranks inherit that.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        heard = [number for number in SIGNALS if number != signal.SIGINT or not ignored]
        self._before = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._launchers: list[int] = []
        for process in launcher.launchers():
            with contextlib.suppress(OSError, AttributeError):  # gone already; a Python built on an older system
                self._launchers.append(os.pidfd_open(process))
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # The same request may still arrive once more while the process ends.
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
                            f"{name}: saving at the next step boundary; another one after {SAME_REQUEST_SECONDS:.0f} s "
                            "ends this process at once",
                            file=sys.stderr,
                            flush=True,
                        )
                elif now - first > SAME_REQUEST_SECONDS and number != _ABANDONED:
                    os._exit(128 + number)

    def agreed(self) -> str | None:
        """Why all ranks should stop now, if one was asked to. Collective."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        vote = torch.tensor([self._asked, int(late)])
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, group=self._group)
        asked, late_somewhere = vote.tolist()
        if asked == _ABANDONED:
            return "the launcher is gone"
        if asked:
            return signal.Signals(asked).name
        return "train.max_minutes" if late_somewhere else None
