"""Watchdog of a run. If a rank dies or is stalled, the watchdog ends all ranks, with a message that names that rank.

A thread of every rank keeps one TCP connection to rank 0, independent of the collectives, which may hang. When a
process dies, its connection closes, so rank 0 knows at once, under any launcher and backend. A rank that makes no
progress for too long tells rank 0, which then asks all ranks for their stacks. Every ten seconds, each rank
reports its step and what it is doing in it.
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

from megamult.distributed import environment
from megamult.distributed.rendezvous import Meeting
from megamult.runtime import exit_codes
from megamult.runtime.hub import CONNECT_SECONDS, LEFT_SECONDS, Deadlines, Hub, keep_alive, send
from megamult.runtime.logs import RankLog
from megamult.runtime.progress import Progress

_HEARTBEAT_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
"""Longest expected time, in seconds, from the end of the first rank to the end of the last."""
_LAST_WORD_SECONDS = 3.0
"""Seconds that a rank waits after SIGTERM for rank 0's verdict, before it ends. The verdict takes half a second."""
_LINE_BYTES = 1 << 24
_TRACEBACK_CHARACTERS = 20_000


class Watchdog:
    """Context in which the watchdog is active. Entering and leaving it are collective over all ranks.

    Args:
        meeting: the rendezvous of all ranks, through whose store rank 0 tells the others where it listens.
        timeout_seconds: seconds within which the run is ended if no rank makes progress.
        log: this rank's log.
    """

    def __init__(self, meeting: Meeting, timeout_seconds: float, log: RankLog) -> None:
        self.progress = Progress()
        self._deadlines, self._log = Deadlines(timeout_seconds), log
        self._rank = environment.rank()
        self._host_of_rank_0 = meeting.machines[0].split()[0]
        self._listener: socket.socket | None = None
        if self._rank == 0:
            address = _address(meeting)
            self._listener = _listen(address)
            port, token = self._listener.getsockname()[1], secrets.token_hex(16)
            meeting.store.set("watchdog", json.dumps([address, port, token, [os.getpid(), _where()]]))
        self._address, self._port, self._token, self._rank_0 = json.loads(meeting.store.get("watchdog"))
        self._loop = asyncio.new_event_loop()
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._connected = threading.Event()
        self._problem: OSError | None = None  # why the connection failed
        self._done = threading.Event()  # the run is over on all ranks, or a verdict ended it
        self._guilty: list[int] = []
        self._patience_since = 0.0
        self._sigterm_before: Any = None

    def __enter__(self) -> Watchdog:
        self._hear_sigterm()
        self._thread.start()
        if not self._connected.wait(CONNECT_SECONDS / 2) or self._problem is not None:
            problem = self._problem or f"no answer within {CONNECT_SECONDS / 2:.0f} s"
            raise ConnectionError(
                f"rank {self._rank} on {environment.host()} reached the rendezvous at port "
                f"{os.environ['MASTER_PORT']}, but cannot reach rank 0's watchdog at {self._address}:{self._port} "
                f"({problem}): allow connections between the run's hosts on all ports"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (SystemExit, KeyboardInterrupt)):
            self._tell({"bye": int(error is not None)})
            # All ranks leave together, because a connection that closes looks like a death. If this rank leaves with an
            # error and others stay, it waits until rank 0 has ended the others. If it leaves without an error and hangs
            # here, `_clock`, which still runs, ends the process.
            alone = LEFT_SECONDS + 2 * _LEAVE_SECONDS
            self._done.wait(alone if error is not None else self._deadlines.timeout + _LEAVE_SECONDS)
            self._thread.join(_LEAVE_SECONDS if not self._guilty else 0.0)
            self._restore_signals()
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        self._tell({"failed": text[-_TRACEBACK_CHARACTERS:], "place": vars(self.progress.place)})
        if self._done.wait(_LEAVE_SECONDS) and self._rank not in self._guilty:
            # This rank failed because another rank had failed. The watchdog's thread says so and ends the process.
            self._thread.join()
        print(text, end="", file=sys.stderr, flush=True)
        self._log.ended()
        os._exit(1)  # the interpreter's clean-up may wait for ranks that have ended

    def _hear_sigterm(self) -> None:
        """Let the thread receive SIGTERM, so that this rank can say, before it ends, which rank died.

        Launchers send SIGTERM to all ranks as soon as they see one die. During training,
        :class:`megamult.runtime.signals.StopRequests` handles the signal. At other times, the thread reads it from a
        pipe to which Python's own C handler writes, so it does not matter what the main thread waits for.
        """
        self._sigterm_before = signal.getsignal(signal.SIGTERM)
        if self._sigterm_before == signal.SIG_IGN:
            return
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)

    def _restore_signals(self) -> None:
        if self._sigterm_before == signal.SIG_IGN:
            return
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # StopRequests ignores it after a request to stop
            signal.signal(signal.SIGTERM, self._sigterm_before)
        signal.set_wakeup_fd(self._wakeup_before)
        for end in (self._reader, self._writer):
            os.close(end)

    def _tell(self, message: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, message)

    # All methods below run in the watchdog's thread.

    def _watch(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._run())
        except OSError as problem:
            self._problem = problem
            self._connected.set()

    def _on_signal(self) -> None:
        if signal.SIGTERM in os.read(self._reader, 64):
            asyncio.get_running_loop().call_later(_LAST_WORD_SECONDS, self._end_of_sigterm)

    def _end_of_sigterm(self) -> None:
        self._log.ended()
        os._exit(128 + signal.SIGTERM)

    async def _run(self) -> None:
        if self._sigterm_before != signal.SIG_IGN:
            asyncio.get_running_loop().add_reader(self._reader, self._on_signal)
        if self._listener is not None:
            hub = Hub(self._token, environment.world_size(), self._deadlines, self.progress)
            server = await asyncio.start_server(hub.serve, sock=self._listener, limit=_LINE_BYTES, backlog=1024)
        reader, writer = await asyncio.open_connection(self._address, self._port, limit=_LINE_BYTES)
        keep_alive(writer)
        hello = {"rank": self._rank, "host": environment.host(), "pid": os.getpid(), "where": _where()}
        send(writer, {"token": self._token, **hello})
        self._connected.set()
        work = (self._listen(reader), self._speak(writer), self._clock(writer))
        tasks = [asyncio.ensure_future(each) for each in work]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        for task in done:
            task.result()  # raise the task's exception here
        writer.close()
        if self._listener is not None:
            server.close()
            await hub.closed(_LEAVE_SECONDS)

    async def _speak(self, writer: asyncio.StreamWriter) -> None:
        while True:
            send(writer, await self._outbox.get())

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Handle rank 0's messages until the run is over."""
        with contextlib.suppress(OSError):
            async for line in reader:
                message = json.loads(line)
                if "report" in message:
                    self._outbox.put_nowait({"status": self.progress.report()})
                elif "patience" in message:
                    self._patience_since = time.monotonic() - message["patience"]
                elif "end" in message:
                    self._guilty = message["guilty"]
                    self._end(message["end"], message["kill"], on_screen=self._rank == 0)
                elif "over" in message:
                    self._done.set()
                    return
        self._without_rank_0("was killed, or its host is down")

    async def _clock(self, writer: asyncio.StreamWriter) -> None:
        tick = min(1.0, self._deadlines.answer / 3)
        asked, beat, before = False, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            if now - before > 5 * tick + 1.0:  # the whole process was stopped
                self.progress.forgive(now - before)
            before = now
            stalled = min(self.progress.seconds_stalled(), now - self._patience_since)
            if stalled > self._deadlines.ask and not asked:
                send(writer, {"stalled": stalled})
            asked = stalled > self._deadlines.ask
            # Ranks that write to the screen end first and kill rank 0. The others end when rank 0's connection closes.
            if stalled > self._deadlines.alone + (0.0 if self._speaks() else self._deadlines.answer / 2):
                report = self.progress.report()
                print(f"rank {self._rank} at {self.progress.place}:\n{report['stack']}", end="", file=sys.stderr)
                self._without_rank_0(f"has not answered, and there was no progress for {stalled:.0f} s")
            if now - beat > _HEARTBEAT_SECONDS:
                beat = now
                send(writer, {"at": vars(self.progress.place)})

    def _without_rank_0(self, what: str) -> NoReturn:
        """End this process without a verdict of rank 0, because rank 0 itself died or is stalled."""
        self._guilty = [0]
        rank_0 = f"rank 0 on {self._host_of_rank_0} (process {self._rank_0[0]})"
        why = f"{rank_0} {what}; this rank was at {self.progress.place}"
        self._end(why, [self._rank_0], self._speaks())  # kill rank 0 too: a stopped process does not end by itself

    def _speaks(self) -> bool:
        """Return whether this rank writes to the screen if rank 0 cannot: rank 1 and the first rank of each node do."""
        return self._rank == 1 or environment.local_rank() == 0

    def _end(self, why: str, kill: list[list[Any]], on_screen: bool) -> NoReturn:
        self._done.set()
        for process, where in kill:
            if where == _where() and process != os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        if self._rank in self._guilty:
            time.sleep(_LEAVE_SECONDS)  # the main thread prints the error and ends the process
        line = f"error: rank {self._rank} on {environment.host()} ends: {why}"
        self._log.say(line, on_screen=on_screen)
        self._log.ended()
        os._exit(exit_codes.WATCHDOG)


def _address(meeting: Meeting) -> str:
    """Return the address of rank 0's host, which is this host.

    The address is MASTER_ADDR, unless torchrun's agent serves the rendezvous and the run has several nodes. Then
    MASTER_ADDR is the agent's host, perhaps a different one, so the address is this host's full name."""
    elsewhere = environment.has_agent_store() and len(set(meeting.machines)) > 1
    return socket.getfqdn() if elsewhere else os.environ["MASTER_ADDR"]


def _listen(address: str) -> socket.socket:
    """Return a socket that listens at a free port of this host.

    `address` is the name by which all ranks know this host. If it is `localhost` or begins with `127.`, the socket
    listens at 127.0.0.1 only.
    """
    if address == "localhost" or address.startswith("127."):
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _where() -> str:
    """Return an identifier of this machine and process namespace. Processes that share it can signal one another."""
    return f"{environment.machine()} {os.readlink('/proc/self/ns/pid')}"
