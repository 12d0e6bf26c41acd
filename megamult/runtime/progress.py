"""How far this process has got, and where it stands: what a watchdog asks of it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    step: int
    doing: str
    count: int
    """How many places it has been at: the same for ranks that have got equally far."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


START = Place(0, "start-up", 0)


class Progress:
    """Noted by the main thread, read by another."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._place = START
        self._since = time.monotonic()

    def at(self, step: int, doing: str, grace: float = 0.0) -> None:
        """The main thread begins something: so far it has got further.

        Args:
            grace: seconds for which it does not count as standing.
        """
        self._place = Place(step, doing, self._place.count + 1)
        self._since = time.monotonic() + grace

    def forgive(self, seconds: float) -> None:
        """Time in which the whole process was stopped does not count."""
        self._since += seconds

    @property
    def place(self) -> Place:
        """The last thing begun."""
        return self._place

    def standing(self) -> float:
        """Seconds since then; negative within its grace."""
        return time.monotonic() - self._since

    def report(self) -> dict[str, Any]:
        """Place and Python stack of the main thread, for JSON."""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        return {"place": asdict(self._place), "standing": self.standing(), "stack": stack}
