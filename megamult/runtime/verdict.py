"""What a watchdog says of ranks that died or stand still: pure functions from what is known to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamult.runtime.console import ranges
from megamult.runtime.progress import START, Place


@dataclass
class Peer:
    """What is known of a rank."""

    rank: int
    host: str
    pid: int
    place: Place = START
    """When it was last heard of."""
    heard: float = 0.0
    """Seconds ago."""
    stack: str | None = None
    """Of its main thread; None: it does not answer."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def died(
    lost: Sequence[Peer], failed: Mapping[int, str], peers: Mapping[int, Peer], here: Place
) -> tuple[str, list[int]]:
    """One line on whose death ended the run, and their ranks.

    Args:
        lost: ranks whose connection closed without a word, as a killed process' does, the first one first: what others
            then report is only what came of it.
        failed: rank -> traceback, in the order in which they were told.
        peers: all ranks.
        here: where rank 0 is.
    """
    if lost:
        first, *others = lost
        after = f" (soon after it: {_listed([str(peer) for peer in others])})" if others else ""
        why = f"{first} was killed, or went without a word, with rank 0 at {here}{after}"
        return why, [peer.rank for peer in lost]
    rank, text = next(iter(failed.items()))
    peer = peers[rank]
    return f"{peer} failed at {peer.place}: {text.strip().splitlines()[-1]}", [rank]


def late(peers: Sequence[Peer]) -> list[Peer]:
    """For whom the others wait: those that do not answer, else those that have got least far if others have got further
    than they."""
    silent = [peer for peer in peers if peer.stack is None]
    if silent:
        return silent
    least = min(peer.place.count for peer in peers)
    behind = [peer for peer in peers if peer.place.count == least]
    return behind if len(behind) < len(peers) else []


def stands_still(peers: Sequence[Peer], seconds: float, timeout: float) -> tuple[str, str]:
    """(one line on who is late, each rank's place and stack with equal ones together).

    Args:
        seconds: for which no rank has got further.
        timeout: within which such a run is ended, in seconds.
    """
    waited_for = late(peers)
    if not waited_for:
        who = "all ranks are at the same place"
    else:
        who = "the late: " + _listed(
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
    """The first eight, and how many more."""
    return ", ".join(which[:8]) + (f" and {len(which) - 8} more" if len(which) > 8 else "")


def _silence(peer: Peer) -> str:
    return f"which does not answer, last heard of {peer.heard:.0f} s ago at {peer.place}"
