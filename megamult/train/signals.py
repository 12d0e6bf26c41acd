"""Requests to save and stop: SIGTERM, SIGUSR1 and a time limit, acted on by all ranks at one step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Watches for signals while it is entered. The first one is noted, a second one ends the process at once.

    Args:
        deadline: of `time.monotonic()`, from which on to stop; None: never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._asked = 0  # a signal's number
        self._before: dict[signal.Signals, Any] = {}
        # CPU ranks of its own: a vote waits for no GPU, and meets no other collective.
        self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> str | None:
        """Why all ranks should stop now, if one was asked to. Collective."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        vote = torch.tensor([self._asked, int(late)])
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, group=self._group)
        asked, late_somewhere = vote.tolist()
        if asked:
            return signal.Signals(asked).name
        return "train.max_minutes" if late_somewhere else None
