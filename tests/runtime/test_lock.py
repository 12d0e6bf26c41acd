"""One live run to a run directory, on file systems that tell all nodes of a lock and on those that tell one."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamult.distributed import environment
from megamult.runtime import lock
from tests.train.command import REPOSITORY

# As a rank 0 that holds the lock until its standard input ends. On the node that is given: where flock knows this
# node's processes only, which no other process of the test runs on.
_HOLD = """
import fcntl, sys
from pathlib import Path
from megamult.distributed import environment
from megamult.runtime import lock
if sys.argv[2:]:
    environment.host = lambda: sys.argv[2]
    environment.machine = lambda: f"{sys.argv[2]} its-kernel"
    fcntl.flock = lambda *_: None
lock.BEAT_SECONDS = 0.1
with lock.RunLock() as held:
    held.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds the folder's lock."""

    def __init__(self, folder: Path, *node: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, folder, *node],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def leave(self) -> None:
        """Let it end in order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        """Let it end without a word."""
        self.process.kill()
        self.process.wait()


Hold = Callable[..., Holder]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between looks at a lock that is not free."""
    found: list[float] = []
    sleep = time.sleep

    def noted(seconds: float) -> None:
        if seconds == lock.LOOK_SECONDS:
            found.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", noted)
    return found


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Makes processes that hold the folder's lock."""
    made: list[Holder] = []

    def make(*node: str) -> Holder:
        made.append(Holder(tmp_path, *node))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for, and a holder is dead after three seconds without a beat."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LOOKS", 30)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)


def test_a_second_run_on_the_node_is_refused_by_name_of_the_first_and_a_killed_one_holds_nothing(
    tmp_path: Path, hold: Hold, fast: None, looks: list[float]
) -> None:
    first = hold()
    name = f"process {first.process.pid} on {environment.host()}"
    with pytest.raises(ValueError, match=f"belongs to a live run .{name}.*--train.run_dir"):
        lock.RunLock().acquire(tmp_path)
    first.kill()
    with lock.RunLock() as mine:
        looks.clear()
        assert not mine.acquire(tmp_path), "a killed run holds nothing, so nobody was waited for"
        assert len(looks) < lock.LOOKS, "the kernel knows at once"
        assert not mine.acquire(tmp_path), "what is held already"
    assert not (tmp_path / "lock").exists(), "a run that ends in order leaves none"


@pytest.mark.parametrize("node", [(), ("n2",)])
def test_an_earlier_run_that_is_about_to_end_is_waited_for(
    tmp_path: Path,
    hold: Hold,
    fast: None,
    node: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)
    first = hold(*node)
    timer = threading.Timer(2.0, first.leave)
    timer.start()
    with lock.RunLock() as mine:
        assert mine.acquire(tmp_path), "it was waited for"
    timer.join()
    assert capsys.readouterr().out.count("waiting until an earlier run has left") == 1


def test_a_live_run_on_another_node_that_flock_does_not_show_is_refused_by_name(
    tmp_path: Path, hold: Hold, fast: None
) -> None:
    first = hold("n2")
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this node's kernel sees no holder
    with pytest.raises(ValueError, match=f"a live run .process {first.process.pid} on n2 since .*run_dir"):
        lock.RunLock().acquire(tmp_path)


def test_a_dead_run_on_another_node_is_taken_over_with_a_line_once_it_has_stood_still(
    tmp_path: Path, hold: Hold, fast: None, looks: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    first = hold("n2")
    first.kill()
    with lock.RunLock() as mine:
        assert not mine.acquire(tmp_path), "nobody was waited for who lived"
        assert len(looks) >= lock.LOOKS
        found, taken = capsys.readouterr().out.splitlines()
        name = f"process {first.process.pid} on n2 since "
        assert f"lock names {name}" in found and taken.startswith(name) and taken.endswith("taking it over")
        assert json.loads((tmp_path / "lock").read_text())["host"] == environment.host()


def test_the_lock_that_an_older_version_left_on_this_host_is_nobodys(
    tmp_path: Path, fast: None, looks: list[float]
) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": environment.host(), "process": 1, "since": "then"}))
    with lock.RunLock() as mine:
        assert not mine.acquire(tmp_path)
        assert len(looks) < lock.LOOKS


def test_who_takes_a_dead_runs_lock_over_just_before_another_does_has_it_not(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock"
    records = [
        json.dumps({"host": f"n{node}", "process": 1, "since": "then", "machine": f"n{node}", "token": str(node)})
        for node in (2, 3)
    ]
    path.write_text(records[0])
    sleep, takes = time.sleep, 0

    def late(seconds: float) -> None:
        nonlocal takes
        if seconds == lock.SETTLE_SECONDS:
            takes += 1
            if takes == 1:
                path.write_text(records[1])
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", late)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)
    with lock.RunLock() as mine:
        assert mine.acquire(tmp_path), "the other one was waited for"
    said = [line.replace(str(tmp_path), "RUN") for line in capsys.readouterr().out.splitlines()]
    assert said[1:] == [
        "process 1 on n2 since then has not written RUN/lock for 30 s: taking it over",
        "waiting until an earlier run has left RUN (process 1 on n3 since then)",
        "process 1 on n3 since then has not written RUN/lock for 30 s: taking it over",
    ]


def test_who_opened_a_lock_that_its_holder_then_removed_does_not_hold_the_next_ones(
    tmp_path: Path, hold: Hold, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, flock = hold(), lock._flock
    holders: list[Holder] = []

    def late(descriptor: int, insist: bool) -> bool | None:
        if not holders:
            first.leave()
            holders.append(hold())
        return flock(descriptor, insist)

    monkeypatch.setattr(lock, "_flock", late)
    with pytest.raises(ValueError, match="belongs to a live run") as refused:
        lock.RunLock().acquire(tmp_path)
    assert f"process {holders[0].process.pid} on" in str(refused.value)


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path: Path, hold: Hold) -> None:
    """It was held up, stopped with its whole machine, say, for longer than others wait."""
    first = hold("n2")
    record = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(record | {"host": "n1", "token": "another"}))
    assert first.process.wait(timeout=30) == 70
