"""Messages of a watchdog about ranks that died or stand still: pure functions from reports to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamult.runtime.console import ranges
from megamult.runtime.progress import START, Place


@dataclass
class Peer:
    """State of a rank as the watchdog knows it."""

    rank: int
    host: str
    pid: int
    place: Place = START
    """Place in its last report."""
    heard: float = 0.0
    """Seconds since its last report."""
    stack: str | None = None
    """Stack of its main thread; None: it does not answer."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def died(
    lost: Sequence[Peer], failed: Mapping[int, str], peers: Mapping[int, Peer], here: Place
) -> tuple[str, list[int]]:
    """Return one line that says which rank's death ended the run, and the numbers of the ranks that died.

    Args:
        lost: ranks whose connection closed without a last message, as that of a killed process does, in the order in
            which they closed. Errors that other ranks report afterwards are only consequences.
        failed: rank -> traceback, in the order in which they were reported.
        peers: all ranks.
        here: rank 0's own place.
    """
    if lost:
        first, *others = lost
        after = f" (soon after it: {_listed([str(peer) for peer in others])})" if others else ""
        why = f"{first} was killed or ended without a message, with rank 0 at {here}{after}"
        return why, [peer.rank for peer in lost]
    rank, text = next(iter(failed.items()))
    peer = peers[rank]
    return f"{peer} failed at {peer.place}: {text.strip().splitlines()[-1]}", [rank]


def late(peers: Sequence[Peer]) -> list[Peer]:
    """List the ranks that the others wait for: those that do not answer; if all do, those that are behind."""
    silent = [peer for peer in peers if peer.stack is None]
    if silent:
        return silent
    least = min(peer.place.count for peer in peers)
    behind = [peer for peer in peers if peer.place.count == least]
    return behind if len(behind) < len(peers) else []


def stands_still(peers: Sequence[Peer], seconds: float, timeout: float) -> tuple[str, str]:
    """Return (one line that names the late ranks, place and stack of each rank with equal ones grouped).

    Args:
        seconds: time since any rank made progress.
        timeout: seconds within which such a run is ended.
    """
    waited_for = late(peers)
    if not waited_for:
        who = "all ranks are at the same place"
    else:
        who = "late: " + _listed(
            [f"{peer}, {_silence(peer) if peer.stack is None else f'at {peer.place}'}" for peer in waited_for]
        )
    line = f"no progress for {seconds:.0f} s (parallel.timeout_minutes {timeout / 60:g}); {who}"
    groups: dict[tuple[str, str], list[int]] = {}
    for peer in peers:
        stack = f"no answer; last heard of {peer.heard:.0f} s ago\n" if peer.stack is None else peer.stack
        groups.setdefault((str(peer.place), stack), []).append(peer.rank)
    text = "".join(f"rank {ranges(members)} at {place}:\n{stack}" for (place, stack), members in groups.items())
    return line, text


def _listed(which: Sequence[str]) -> str:
    """Join the first eight items, and say how many others there are."""
    return ", ".join(which[:8]) + (f" and {len(which) - 8} more" if len(which) > 8 else "")


def _silence(peer: Peer) -> str:
    return f"which does not answer, last heard of {peer.heard:.0f} s ago at {peer.place}"
