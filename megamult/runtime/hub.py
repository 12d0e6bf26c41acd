"""Rank 0's part of the watchdog: it receives the reports of all ranks, and decides which rank died or is stalled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megamult.runtime import verdict
from megamult.runtime.console import ranges
from megamult.runtime.progress import Place, Progress
from megamult.runtime.verdict import Peer

CONNECT_SECONDS = 60.0
"""Seconds after the rendezvous within which every rank must connect to the watchdog's port on rank 0."""


@dataclass(frozen=True)
class Deadlines:
    """Deadlines of the watchdog in seconds, for a run without progress. All are within the run's timeout.

    A process stopped by a signal (SIGSTOP) does not end itself: another rank on its host must kill it. If no other rank
    is there, the launcher must end the process."""

    timeout: float

    @property
    def answer(self) -> float:
        """Seconds that a live rank has to send its stack when asked. Rank 0 then has as many seconds to send its
        verdict: the message that ends all ranks and says why."""
        return min(5.0, self.timeout / 6)

    @property
    def ask(self) -> float:
        """Seconds without progress after which a rank asks rank 0 whether any rank makes progress."""
        return self.timeout - 3 * self.answer

    @property
    def alone(self) -> float:
        """Seconds without progress after which a rank ends without a verdict of rank 0. It has then waited
        for 2 x `answer` seconds since it asked rank 0."""
        return self.timeout - self.answer


_SETTLE_SECONDS = 0.5
"""Seconds from the first report of a death to the verdict. If a rank's death makes other ranks die, the report of its
death may come after the reports of theirs."""

LEFT_SECONDS = 10.0
"""Seconds within which the other ranks must leave after one rank has left with an error. Ranks that have not left by
then are ended."""


@dataclass
class _Connection:
    peer: Peer
    where: str
    """Identifier of the rank's machine and process namespace. Processes that share it can signal one another."""
    writer: asyncio.StreamWriter
    heard: float
    """Value of `time.monotonic()` when the rank's last message came."""
    left: bool = False
    """Whether the rank has said that it leaves."""
    stalled: float = 0.0
    """Seconds without progress, from the rank's last status report."""


class Hub:
    """Server on rank 0, to which every rank connects, rank 0 included.

    Args:
        token: secret that every rank sends first. A connection that does not send it is closed.
        size: number of ranks.
        deadlines: deadlines for ranks without progress.
        progress: rank 0's own progress.
    """

    def __init__(self, token: str, size: int, deadlines: Deadlines, progress: Progress) -> None:
        self._token, self._size, self._deadlines, self._progress = token, size, deadlines, progress
        self._ranks: dict[int, _Connection] = {}
        self._lost: list[Peer] = []
        self._failed: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._ended = False
        self._absent = set(range(size))
        self._later(CONNECT_SECONDS, self._absentees)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one rank, from its first message until its connection closes."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._serving.discard(task)
            writer.close()

    async def closed(self, seconds: float) -> None:
        """Wait until every rank has closed its connection, for at most `seconds`."""
        if self._serving:
            await asyncio.wait(self._serving, timeout=seconds)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        keep_alive(writer)
        try:
            hello = json.loads(await reader.readline())
            if hello["token"] != self._token:
                raise ValueError("the connection is not from a rank of this run")
        except (ValueError, KeyError, TypeError, OSError):
            return
        self._absent.discard(hello["rank"])
        peer = Peer(hello["rank"], hello["host"], hello["pid"])
        rank = _Connection(peer, hello["where"], writer, time.monotonic())
        self._ranks[peer.rank] = rank
        with contextlib.suppress(OSError):
            async for line in reader:
                rank.heard = time.monotonic()
                self._hear(rank, json.loads(line))
        if not rank.left:
            self._lost.append(peer)
            self._later(_SETTLE_SECONDS, self._death)

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            do()

        task = asyncio.ensure_future(wait())
        self._tasks.add(task)  # asyncio itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    def _hear(self, rank: _Connection, message: dict[str, Any]) -> None:
        if "at" in message:
            rank.peer.place = Place(**message["at"])
        elif "status" in message:
            status = message["status"]
            rank.peer.place, rank.peer.stack = Place(**status["place"]), status["stack"]
            rank.stalled = status["stalled"]
        elif "stalled" in message:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.ensure_future(self._ask())
        elif "failed" in message:
            rank.peer.place = Place(**message["place"])
            self._failed[rank.peer.rank] = message["failed"]
            self._later(_SETTLE_SECONDS, self._death)
        elif "bye" in message:
            rank.left = True
            if all(each.left for each in self._ranks.values()) and len(self._ranks) == self._size:
                self._all({"over": True})
            elif message["bye"]:
                self._later(LEFT_SECONDS, lambda: self._left_early(rank.peer))

    def _left_early(self, peer: Peer) -> None:
        remaining = [number for number, each in self._ranks.items() if not each.left]
        if remaining:
            self._end(f"{peer} ended with an error, and rank {ranges(remaining)} did not end", [peer.rank], [])

    def _absentees(self) -> None:
        if self._absent:
            absent = sorted(self._absent)
            why = f"rank {ranges(absent)} did not reach rank 0's watchdog within {CONNECT_SECONDS:.0f} s"
            self._end(why, absent, [])

    def _death(self) -> None:
        if self._ended:
            return
        peers = {number: each.peer for number, each in self._ranks.items()}
        why, guilty = verdict.died(self._lost, self._failed, peers, self._progress.place)
        for number in guilty:
            if number != 0 and number in self._failed:  # rank 0's main thread prints its own error
                print(f"{self._ranks[number].peer}:\n{self._failed[number]}", end="", file=sys.stderr)
        self._end(why, guilty, [])

    async def _ask(self) -> None:
        """Ask every rank for its place and stack, and end the run if no rank has made progress for too long."""
        for rank in self._ranks.values():
            rank.peer.stack = None
        self._all({"report": True})
        deadline = time.monotonic() + self._deadlines.answer
        while time.monotonic() < deadline and any(rank.peer.stack is None for rank in self._ranks.values()):
            await asyncio.sleep(0.05)
        now = time.monotonic()
        for rank in self._ranks.values():
            rank.peer.heard = now - rank.heard
        answered = [rank for rank in self._ranks.values() if rank.peer.stack is not None]
        stalled = min((rank.stalled for rank in answered), default=self._deadlines.ask)
        if stalled < self._deadlines.ask - self._deadlines.answer:
            self._all({"patience": max(0.0, stalled)})
            return
        peers = [self._ranks[rank].peer for rank in sorted(self._ranks)]
        line, text = verdict.stands_still(peers, stalled, self._deadlines.timeout)
        print(text, end="", file=sys.stderr)
        silent = [rank for rank in self._ranks.values() if rank.peer.stack is None]
        self._end(line, [rank.peer.rank for rank in silent], [[rank.peer.pid, rank.where] for rank in silent])

    def _all(self, message: dict[str, Any]) -> None:
        # Send to rank 0 last, because the message may end its process, which is this one.
        for number in sorted(self._ranks, reverse=True):
            with contextlib.suppress(OSError):
                send(self._ranks[number].writer, message)

    def _end(self, why: str, guilty: list[int], kill: list[list[Any]]) -> None:
        if not self._ended:
            self._ended = True
            self._all({"end": why, "guilty": guilty, "kill": kill})


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Turn on TCP keep-alive: kernels check that the other host is up, even while a process is stopped or busy."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 9)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000
    )  # milliseconds after which unacknowledged data breaks the connection


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Send a message as one line of JSON."""
    writer.write(json.dumps(message).encode() + b"\n")
