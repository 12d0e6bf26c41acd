"""Ranks that watch one another: one that dies or stands still ends the run everywhere, and is named.

Every rank has one TCP connection to rank 0, from a thread of its own, apart from the collectives that may hang. A
process that dies closes it, so that rank 0 knows at once, under any launcher and backend. A rank whose own clock runs
out asks rank 0, which asks all for their stacks. Otherwise a rank says every ten seconds where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

from megamult import environment
from megamult.rendezvous import Meeting
from megamult.train.hub import ANSWER_SECONDS, Hub, send
from megamult.train.logs import RankLog
from megamult.train.progress import Progress

EXIT_WATCHDOG = 70
"""The run was ended because a rank died or stood still (EX_SOFTWARE)."""

_CONNECT_SECONDS = 30.0
_HEARTBEAT_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
"""For which the ends of ranks may lie apart."""
_LINE_BYTES = 1 << 24
_TRACEBACK_CHARACTERS = 20_000


class Watchdog:
    """Watches while it is entered; entering and leaving are collective over all ranks.

    Args:
        meeting: of all ranks; its store tells them where rank 0 listens.
        timeout_seconds: without progress of any rank, after which the run is ended.
        log: of this rank.
    """

    def __init__(self, meeting: Meeting, timeout_seconds: float, log: RankLog) -> None:
        self.progress = Progress()
        self._timeout, self._log = timeout_seconds, log
        self._rank = environment.rank()
        self._host_of_rank_0 = meeting.machines[0].split()[0]
        self._listener: socket.socket | None = None
        if self._rank == 0:
            self._listener = _listen(os.environ["MASTER_ADDR"])
            meeting.store.set("watchdog", json.dumps([self._listener.getsockname()[1], secrets.token_hex(16)]))
        self._port, self._token = json.loads(meeting.store.get("watchdog"))
        self._loop = asyncio.new_event_loop()
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._connected = threading.Event()
        self._over = threading.Event()  # everywhere, and in order
        self._ended = threading.Event()  # by a verdict
        self._guilty: list[int] = []
        self._patience_since = 0.0

    def __enter__(self) -> Watchdog:
        self._thread.start()
        if not self._connected.wait(_CONNECT_SECONDS):
            raise ConnectionError(
                f"rank {self._rank} on {environment.host()} reached rank 0 at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, but not at its port {self._port}: let ranks reach each other at any port"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (SystemExit, KeyboardInterrupt)):
            self._tell({"bye": int(error is not None)})
            # Rank 0 leaves with all others: that its connection closes must not look like its death.
            self._over.wait(_LEAVE_SECONDS)
            self._thread.join(_LEAVE_SECONDS)
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        self._tell({"failed": text[-_TRACEBACK_CHARACTERS:], "place": vars(self.progress.place)})
        if self._ended.wait(_LEAVE_SECONDS) and self._rank not in self._guilty:
            # It failed because another one had; the thread says so and ends the process.
            self._thread.join()
        print(text, end="", file=sys.stderr, flush=True)
        os._exit(1)  # the interpreter's clean-up may wait for peers that are gone

    def at(self, step: int, doing: str) -> None:
        """This rank has got as far as to begin this."""
        self.progress.at(step, doing)

    def _tell(self, message: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, message)

    # What follows runs in the thread.

    def _watch(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        if self._listener is not None:
            hub = Hub(self._token, environment.world_size(), self._timeout, self.progress)
            server = await asyncio.start_server(hub.serve, sock=self._listener, limit=_LINE_BYTES)
        reader, writer = await asyncio.open_connection(os.environ["MASTER_ADDR"], self._port, limit=_LINE_BYTES)
        hello = {"rank": self._rank, "host": environment.host(), "pid": os.getpid(), "where": _where()}
        send(writer, {"token": self._token, **hello})
        self._connected.set()
        tasks = [asyncio.ensure_future(each) for each in (self._speak(writer), self._clock(writer))]
        await self._listen(reader)
        for task in tasks:
            task.cancel()
        writer.close()
        if self._listener is not None:
            server.close()
            await hub.closed(_LEAVE_SECONDS)

    async def _speak(self, writer: asyncio.StreamWriter) -> None:
        while True:
            send(writer, await self._outbox.get())

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Until the run is over."""
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                message = json.loads(line)
                if "report" in message:
                    self._outbox.put_nowait({"status": self.progress.report()})
                elif "patience" in message:
                    self._patience_since = time.monotonic()
                elif "end" in message:
                    self._guilty = message["guilty"]
                    self._end(message["end"], message["kill"], on_screen=self._rank == 0)
                elif "over" in message:
                    self._over.set()
                    return
        self._without_rank_0("is gone: killed, or its host is down")

    async def _clock(self, writer: asyncio.StreamWriter) -> None:
        tick = min(1.0, self._timeout / 10)
        asked, beat, before = False, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            if now - before > 5 * tick + 1.0:  # the whole process was stopped
                self.progress.forgive(now - before)
            before = now
            standing = min(self.progress.standing(), now - self._patience_since)
            if standing > self._timeout and not asked:
                send(writer, {"stalled": standing})
            asked = standing > self._timeout
            if standing > self._timeout + 3 * ANSWER_SECONDS:
                report = self.progress.report()
                print(f"rank {self._rank} at {self.progress.place}:\n{report['stack']}", end="", file=sys.stderr)
                self._without_rank_0(f"has not answered, and there was no progress for {standing:.0f} s")
            if now - beat > _HEARTBEAT_SECONDS:
                beat = now
                send(writer, {"at": vars(self.progress.place)})

    def _without_rank_0(self, what: str) -> NoReturn:
        """Every rank decides by itself; the first of each node, or the next one, says so on the screen."""
        self._guilty = [0]
        speaks = self._rank == 1 or environment.local_rank() == 0
        self._end(f"rank 0 on {self._host_of_rank_0} {what}; this rank was at {self.progress.place}", [], speaks)

    def _end(self, why: str, kill: list[list[Any]], on_screen: bool) -> NoReturn:
        self._ended.set()
        for process, where in kill:
            if where == _where() and process != os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        if self._rank in self._guilty:
            time.sleep(_LEAVE_SECONDS)  # the main thread says what was wrong, and ends the process
        line = f"error: rank {self._rank} on {environment.host()} ends: {why}"
        self._log.say(line, on_screen=on_screen)
        os._exit(EXIT_WATCHDOG)


def _listen(address: str) -> socket.socket:
    """A free port of this host, which is the one that the launcher calls `address`."""
    if address == "localhost" or address.startswith("127."):
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _where() -> str:
    """The same for processes that can signal one another by number: one machine, one process namespace."""
    return f"{environment.machine()} {os.readlink('/proc/self/ns/pid')}"
