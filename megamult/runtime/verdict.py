"""Messages of the watchdog about ranks that died or are stalled: pure functions from the ranks' reports to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamult.runtime.console import ranges
from megamult.runtime.progress import START, Place


@dataclass
class Peer:
    """State of a rank, as far as the watchdog knows it."""

    rank: int
    host: str
    pid: int
    place: Place = START
    """Place in the rank's last report."""
    heard: float = 0.0
    """Seconds since the rank's last message."""
    stack: str | None = None
    """Stack of the rank's main thread, or None if the rank does not answer."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def died(
    lost: Sequence[Peer], failed: Mapping[int, str], peers: Mapping[int, Peer], here: Place
) -> tuple[str, list[int]]:
    """Return (line, numbers). The line says which rank's death ended the run. The numbers are those of the ranks at
    fault.

    Args:
        lost: ranks whose connections closed without a last message (as happens when a process is killed), in the order
            of closing. If there are any, errors that other ranks report count as consequences.
        failed: mapping from each rank that reported an error to its traceback, in the order of the reports.
        peers: all ranks, by number.
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
    """List the ranks that the others wait for: those that do not answer or, if all answer, those that are behind.

    The list is empty if all ranks answer and are equally far."""
    silent = [peer for peer in peers if peer.stack is None]
    if silent:
        return silent
    least = min(peer.place.count for peer in peers)
    behind = [peer for peer in peers if peer.place.count == least]
    return behind if len(behind) < len(peers) else []


def stands_still(peers: Sequence[Peer], seconds: float, timeout: float) -> tuple[str, str]:
    """Return (line, text). The line names the late ranks. The text shows the place and the stack of every rank; ranks
    with the same place and stack share one entry.

    Args:
        seconds: seconds since any rank last made progress.
        timeout: seconds within which a run without progress is ended.
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
    """Join the first eight items, and add how many more there are."""
    return ", ".join(which[:8]) + (f" and {len(which) - 8} more" if len(which) > 8 else "")


def _silence(peer: Peer) -> str:
    return f"which does not answer, last heard of {peer.heard:.0f} s ago at {peer.place}"
