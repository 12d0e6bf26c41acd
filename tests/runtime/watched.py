"""Ranks that only watch and are watched: `python -m tests.runtime.watched FOLDER TIMEOUT PART...`, a part for each.

Prints their exit codes, and the seconds from when the last one got further to the end of all; screen_N in FOLDER has
what each said on the screen, rank_N.log is its log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from megamult.distributed import environment, rendezvous
from megamult.runtime.logs import RankLog
from megamult.runtime.watchdog import Watchdog
from tests.processes import free_port


def main(folder: Path, timeout: float, part: str) -> None:
    """Step for a while; then do what `part` says: end, fail, die, be told to end, stop, hang, linger, crawl, leave."""
    meeting = rendezvous.meet(60)
    with RankLog() as log, Watchdog(meeting, timeout, log) as watchdog:
        log.open(folder)
        for step in range(1, 4):
            watchdog.progress.at(step, "step")
            time.sleep(0.1)
        print(f"rank {environment.rank()} plays {part}")
        if part == "linger":
            time.sleep(timeout / 6)
            watchdog.progress.at(4, "a little later than the others")
        (folder / f"since_{environment.rank()}").write_text(str(time.monotonic()))
        if part == "fail":
            raise LookupError("no such token")
        if part == "die and be told of":
            # As a launcher does that sees the death at once: it ends all others.
            ranks = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
            for other in {int(rank) for rank in ranks} - {os.getpid()}:
                os.kill(other, signal.SIGTERM)
        if part in ("die", "die and be told of"):
            os.kill(os.getpid(), signal.SIGKILL)
        if part == "be told to end":
            os.kill(os.getpid(), signal.SIGTERM)
            _never_ends()
        if part == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if part == "leave":
            sys.exit(2)
        if part == "linger":
            _never_ends()
        if part == "hang":
            watchdog.progress.at(4, "what the others wait for")
            _never_ends()
        if part == "wait":
            watchdog.progress.at(4, "what the others wait for")
            watchdog.progress.at(4, "all_reduce")
            _never_ends()
        if part == "crawl":
            for _ in range(24):
                watchdog.progress.at(4, "a long way")
                time.sleep(timeout / 8)
        if part == "wait for the crawler":
            time.sleep(3 * timeout)


def _never_ends() -> None:
    while True:
        time.sleep(0.1)


def _fork(rank: int, size: int, port: int, folder: Path, timeout: float, part: str) -> int:
    process = os.fork()  # one import for all ranks
    if process:
        return process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    screen = os.open(folder / f"screen_{rank}", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(screen, number)
    code = 1
    try:
        main(folder, timeout, part)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _all(folder: Path, timeout: float, parts: list[str]) -> None:
    port = free_port()
    ranks = [_fork(rank, len(parts), port, folder, timeout, part) for rank, part in enumerate(parts)]
    codes = {}
    for process in ranks[1:]:
        codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    codes[ranks[0]] = os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1])
    # A rank that is ended before it has got so far has none.
    since = max(float(path.read_text()) for path in folder.glob("since_*"))
    print(json.dumps({"codes": [codes[process] for process in ranks], "seconds": time.monotonic() - since}))


if __name__ == "__main__":
    _all(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
