"""Progress of this process: its place in training, and the stack, for the watchdog."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Place of a rank in training."""

    step: int
    doing: str
    count: int
    """Number of places so far: the same for ranks that have got equally far."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


START = Place(0, "start-up", 0)


class Progress:
    """Progress that the main thread notes and another thread reads."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._place = START
        self._since = time.monotonic()

    def at(self, step: int, doing: str, grace: float = 0.0) -> None:
        """Note that the main thread begins something, which counts as progress.

        Args:
            grace: seconds of the new work that do not count as time without progress.
        """
        self._place = Place(step, doing, self._place.count + 1)
        self._since = time.monotonic() + grace

    def forgive(self, seconds: float) -> None:
        """Discount time in which the whole process was stopped."""
        self._since += seconds

    @property
    def place(self) -> Place:
        """The last place noted."""
        return self._place

    def seconds_stalled(self) -> float:
        """Return the seconds without progress; negative while the grace that :meth:`at` was given has not passed."""
        return time.monotonic() - self._since

    def report(self) -> dict[str, Any]:
        """Return place and Python stack of the main thread, ready for JSON."""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        return {"place": asdict(self._place), "stalled": self.seconds_stalled(), "stack": stack}
