"""Progress of this process, for the watchdog: its place in training, and the stack of its main thread."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """How far a rank is in training: the step, and what it does in the step."""

    step: int
    doing: str
    count: int
    """Number of places that the rank has noted so far. Ranks that are equally far have the same number."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


START = Place(0, "start-up", 0)


class Progress:
    """Progress of a rank. The main thread notes it, and another thread reads it."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._place = START
        self._since = time.monotonic()

    def at(self, step: int, doing: str, grace: float = 0.0) -> None:
        """Record that the main thread begins new work, which counts as progress.

        Args:
            step: the optimizer step that the work belongs to.
            doing: description of the work, for messages.
            grace: seconds from now on that do not count as time without progress.
        """
        self._place = Place(step, doing, self._place.count + 1)
        self._since = time.monotonic() + grace

    def forgive(self, seconds: float) -> None:
        """Subtract `seconds`, for which the whole process was stopped, from the time without progress."""
        self._since += seconds

    @property
    def place(self) -> Place:
        """Place of the rank that :meth:`at` noted last."""
        return self._place

    def seconds_stalled(self) -> float:
        """Return the seconds without progress. They are negative until the grace given to :meth:`at` has passed."""
        return time.monotonic() - self._since

    def report(self) -> dict[str, Any]:
        """Return what the main thread does (:class:`Place`), its seconds without progress, and its Python stack.

        The result can be written as JSON.
        """
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        return {"place": asdict(self._place), "stalled": self.seconds_stalled(), "stack": stack}
