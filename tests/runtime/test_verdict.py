"""What the watchdog says, from what it knows."""

from __future__ import annotations

from megamult.runtime.progress import Place
from megamult.runtime.verdict import Peer, died, late, stands_still


def peer(rank: int, count: int = 7, stack: str | None = "in all_reduce\n", heard: float = 0.1) -> Peer:
    return Peer(rank, f"n{rank // 2 + 1}", 100 + rank, Place(count, f"micro-batch {count}", count), heard, stack)


def test_a_rank_gone_without_a_word_is_blamed_before_those_that_failed_of_it() -> None:
    peers = {rank: peer(rank) for rank in range(3)}
    told = {0: "Traceback\nRuntimeError: Connection closed by peer\n"}
    why, guilty = died([peers[2]], told, peers, Place(8, "micro-batch 8", 9))
    assert guilty == [2]
    assert why == (
        "rank 2 on n2 (process 102) was killed or ended without a message, with rank 0 at step 8, micro-batch 8"
    )


def test_of_ranks_gone_without_a_word_the_first_is_named_first_and_eight_of_those_that_followed() -> None:
    peers = {rank: peer(rank) for rank in range(11)}
    gone = [peers[rank] for rank in (3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10)]
    why, guilty = died(gone, {}, peers, Place(8, "micro-batch 8", 9))
    assert why.startswith("rank 3 on n2 (process 103) was killed or ended without a message, with rank 0 at step 8, ")
    assert why.endswith(" (soon after it: " + ", ".join(map(str, gone[1:9])) + " and 2 more)")
    assert guilty == [peer.rank for peer in gone]


def test_of_ranks_that_failed_the_first_is_blamed_with_its_last_line() -> None:
    peers = {rank: peer(rank) for rank in range(3)}
    told = {2: "Traceback\n  File x\nValueError: no such token\n", 0: "Traceback\nRuntimeError: closed\n"}
    why, guilty = died([], told, peers, Place(8, "micro-batch 8", 9))
    assert (why, guilty) == (
        "rank 2 on n2 (process 102) failed at step 7, micro-batch 7: ValueError: no such token",
        [2],
    )


def test_the_late_are_the_silent_else_those_behind_else_nobody() -> None:
    silent, behind, ahead = peer(0, stack=None, count=9), peer(1, count=6), peer(2)
    assert late([silent, behind, ahead]) == [silent]
    assert late([behind, ahead, peer(3)]) == [behind]
    assert late([ahead, peer(3)]) == []


def test_equal_stacks_are_said_once_and_the_late_in_the_first_line() -> None:
    line, text = stands_still([peer(0), peer(1), peer(2, stack=None, heard=61), peer(3, count=6)], 47, 60)
    assert line == (
        "no progress for 47 s (parallel.timeout_minutes 1); late: rank 2 on n2 (process 102), which does not "
        "answer, last heard of 61 s ago at step 7, micro-batch 7"
    )
    assert text == (
        "rank 0-1 at step 7, micro-batch 7:\nin all_reduce\n"
        "rank 2 at step 7, micro-batch 7:\nno answer; last heard of 61 s ago\n"
        "rank 3 at step 6, micro-batch 6:\nin all_reduce\n"
    )
    line, _ = stands_still([peer(0), peer(1, count=6)], 47, 60)
    assert line.endswith("late: rank 1 on n1 (process 101), at step 6, micro-batch 6")
    line, _ = stands_still([peer(0), peer(1)], 47, 60)
    assert line.endswith("all ranks are at the same place")
