"""Real processes that watch one another, without a model between them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamult.distributed import environment
from megamult.runtime.logs import left_without_a_word
from tests.programs import Program

# What each rank does -> seconds within which a run without progress is ended. A minute: no test waits for it.
PLAYS = {
    "end, end, end": 60,
    "wait, wait, fail": 60,
    "fail, wait": 60,
    "wait, die, wait": 60,
    "die, wait, wait": 60,
    "wait, die and be told of": 60,
    "die and be told of, wait": 60,
    "wait, be told to end": 60,
    "wait, stop, wait": 18,
    "stop, wait, wait": 18,
    "wait, hang": 18,
    "wait, linger": 36,
    "crawl, wait for the crawler": 8,
    "wait, leave": 60,
    "leave, wait": 60,
}


@dataclass
class Ended:
    """By rank."""

    codes: list[int]
    screens: list[str]
    logs: list[str]
    seconds: float
    """Since the last one that got further did."""


class Plays:
    """All of them at once: they mostly wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drivers: dict[str, Program] = {}
        self._outputs: dict[str, tuple[str, str]] = {}
        for number, (parts, timeout) in enumerate(PLAYS.items()):
            own = folder / str(number)
            own.mkdir()
            self._drivers[parts] = Program(["-m", "tests.runtime.watched", own, str(timeout), *parts.split(", ")])

    def folder(self, parts: str) -> Path:
        """Where a play's ranks write."""
        return self._folder / str(list(PLAYS).index(parts))

    def __call__(self, parts: str) -> Ended:
        if parts not in self._outputs:
            self._outputs[parts] = self._drivers[parts].communicate(timeout=120)
        output, errors = self._outputs[parts]
        assert output, errors
        said = json.loads(output)
        codes = said["codes"]
        own = self.folder(parts)
        screens, logs = (
            [(own / name.format(rank)).read_text() for rank in range(len(codes))]
            for name in ("screen_{}", "rank_{}.log")
        )
        return Ended(codes, screens, logs, said["seconds"])

    def end(self) -> None:
        for driver in self._drivers.values():
            driver.kill()
            driver.wait()


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plays]:
    plays = Plays(tmp_path_factory.mktemp("plays"))
    yield plays
    plays.end()


def test_ranks_that_come_to_their_end_leave_in_silence(play: Plays) -> None:
    ended = play("end, end, end")
    assert ended.codes == [0, 0, 0]
    assert ended.screens == ["rank 0 plays end\n", "", ""], "rank 0's on the screen"
    assert ended.logs == [f"rank {rank} plays end\n" for rank in range(3)], "every rank's in its own file"


def test_the_traceback_of_a_rank_that_fails_is_on_rank_0s_screen_once_and_all_end(play: Plays) -> None:
    ended = play("wait, wait, fail")
    assert ended.codes == [70, 70, 1]
    screen = ended.screens[0]
    assert screen.count("Traceback") == 1 and screen.count("LookupError: no such token") == 2
    first, last = screen.index("Traceback"), screen.splitlines()[-1]
    assert first < screen.index(last)
    assert "rank 2 on " in last and last.endswith("failed at step 3, step: LookupError: no such token")
    assert ended.screens[1] == ended.screens[2] == "", "one screen, one message"
    assert ended.logs[1].splitlines()[-1].endswith("LookupError: no such token")
    assert "Traceback" in ended.logs[2]


def test_rank_0s_own_failure_is_said_once(play: Plays) -> None:
    ended = play("fail, wait")
    assert ended.codes == [1, 70]
    assert ended.screens[0].count("Traceback") == 1 and ended.screens[1] == ""
    assert "rank 0 on " in ended.logs[1] and "LookupError" in ended.logs[1]


def test_a_killed_rank_is_named_at_once_and_all_end(play: Plays) -> None:
    ended = play("wait, die, wait")
    assert ended.codes == [70, -9, 70]
    assert "rank 1 on " in ended.screens[0].splitlines()[-1] and "killed" in ended.screens[0]


def test_when_rank_0_is_killed_the_next_one_says_so_on_its_screen(play: Plays) -> None:
    ended = play("die, wait, wait")
    assert ended.codes == [-9, 70, 70]
    assert re.search(rf"rank 0 on {environment.host()} \(process [0-9]+\) was killed", ended.screens[1])
    assert ended.screens[2] == ""


def test_a_launcher_that_ends_all_ranks_at_once_does_not_silence_the_one_that_says_whose_death_it_was(
    play: Plays,
) -> None:
    ended = play("wait, die and be told of")
    assert ended.codes == [70, -9]
    assert f"rank 1 on {environment.host()} (process " in ended.screens[0].splitlines()[-1]
    assert "was killed or ended without a message, with rank 0 at step " in ended.screens[0]
    ended = play("die and be told of, wait")
    assert ended.codes == [-9, 70]
    assert re.search(rf"rank 0 on {environment.host()} \(process [0-9]+\) was killed, or", ended.screens[1])


def test_sigterm_while_no_training_hears_it_ends_a_rank_once_the_watchdog_has_had_its_say(play: Plays) -> None:
    ended = play("wait, be told to end")
    assert ended.codes == [70, 128 + 15]
    assert "rank 1 on " in ended.screens[0].splitlines()[-1]


def test_only_a_killed_rank_leaves_its_mark(play: Plays) -> None:
    play("wait, die, wait")
    folder = play.folder("wait, die, wait")
    found = left_without_a_word(folder)
    assert len(found) == 1 and found[0].startswith(f"rank 1 on {environment.host()} (process ")
    assert left_without_a_word(folder) == [], "each is told once"
    for parts in ("end, end, end", "wait, wait, fail", "wait, leave"):
        play(parts)
        assert left_without_a_word(play.folder(parts)) == [], parts


def test_a_stopped_rank_is_the_late_one_and_ended_too(play: Plays) -> None:
    ended = play("wait, stop, wait")
    assert ended.codes == [70, -9, 70]
    assert "no progress for " in ended.screens[0] and "(parallel.timeout_minutes 0.3)" in ended.screens[0]
    assert "late: rank 1 on " in ended.screens[0] and "does not answer" in ended.screens[0]
    assert ended.screens[0].count("_never_ends") >= 1, "the stacks of those that wait"
    assert "rank 0, 2 at step 4, all_reduce:" in ended.screens[0]
    assert 18 / 2 <= ended.seconds < 18, "within the timeout, and no sooner than it takes to ask"


def test_when_rank_0_is_stopped_the_others_end_by_themselves(play: Plays) -> None:
    ended = play("stop, wait, wait")
    assert ended.codes == [-9, 70, 70]
    assert re.search(rf"rank 0 on {environment.host()} \(process [0-9]+\) has not answered", ended.screens[1])
    assert ended.seconds < 18


def test_who_has_got_least_far_is_late_though_all_answer(play: Plays) -> None:
    ended = play("wait, hang")
    assert ended.codes == [70, 70]
    assert "late: rank 1 on " in ended.screens[0] and "at step 4, what the others wait for" in ended.screens[0]


def test_the_timeout_counts_from_when_the_last_one_got_further(play: Plays) -> None:
    ended = play("wait, linger")
    assert ended.codes == [70, 70]
    # Rank 0 asks 21 s after it stands, when rank 1 has stood for 15; both have for 21 another 6 s later. Asking anew
    # only after another 21 s would be too late.
    assert 21 <= ended.seconds < 30
    assert "late: rank 1 on " in ended.screens[0] and "a little later than the others" in ended.screens[0]


def test_nobody_is_ended_while_one_rank_still_gets_further(play: Plays) -> None:
    ended = play("crawl, wait for the crawler")
    assert ended.codes == [0, 0], ended.screens


def test_a_rank_that_leaves_alone_ends_the_others(play: Plays) -> None:
    ended = play("wait, leave")
    assert ended.codes == [70, 2] and "ended with an error" in ended.screens[0]


def test_rank_0_that_leaves_alone_ends_the_others_and_is_not_called_killed(play: Plays) -> None:
    ended = play("leave, wait")
    assert ended.codes == [2, 70] and "rank 0 on" in ended.logs[1] and "ended with an error" in ended.logs[1]
