"""Which processes belong to one launch, and what differs between those that do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megamult.distributed.claims import Claim, judge, mistake, same_launch, unlike
from megamult.settings import ABSENT, differences, flat

CONFIGURATIONS = {
    "a": flat({"optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}, "deepspeed": {}}),
    "b": flat({"optimizer": {"lr": 2e-3, "betas": (0.9, 0.95)}, "deepspeed": {"zero_optimization": {"x": 1}}}),
}


def claim(rank: int, node: str = "n1", launcher: str = "", of: int = 0, **other: Any) -> Claim:
    """A rank of a launch of four, two per node."""
    given = {
        "size": 4,
        "host": node,
        "pid": 100 + rank,
        "machine": node,
        "launch": "",
        "command": "pretrain.py",
        "configuration": "a",
    }
    return Claim(
        rank=rank,
        launcher=launcher,
        siblings=(of, 2) if launcher else (rank, 1),
        **(given | {"configuration": "a"} | other),
    )


RANK_0 = claim(0, launcher="A on n1")


@pytest.mark.parametrize(
    ("other", "related"),
    [
        (claim(1, launcher="A on n1"), True),
        (claim(1, launcher="B on n1"), False),  # rank 0's launcher starts rank 1 itself
        (claim(1), False),
        (claim(2, "n2", "A on n2", 2), None),
        (claim(2, "n2"), None),
        (claim(0, "n2", "B on n2"), False),
        (claim(2, "n2", launch="Slurm 7.0"), False),
    ],
)
def test_one_launcher_or_one_name_makes_a_launch_and_what_a_launcher_starts_itself_comes_from_nobody_else(
    other: Claim, related: bool | None
) -> None:
    assert same_launch(RANK_0, other) is related
    assert same_launch(other, RANK_0) is related


def test_a_schedulers_name_for_the_launch_decides() -> None:
    one, other = (claim(rank, f"n{rank}", launch="Slurm 7.0") for rank in (0, 3))
    assert same_launch(one, other) is True
    assert same_launch(one, dataclasses.replace(other, launch="Slurm 8.0")) is False


def test_a_strangers_problem_or_configuration_refuses_the_stranger_and_a_ranks_own_is_its_launchs() -> None:
    mine, far = claim(1, launcher="A on n1", problem="no such file"), claim(2, "n2", problem="no such file")
    taken = {0: RANK_0}
    assert judge(mine, RANK_0, taken, None) is None
    assert judge(far, RANK_0, taken, None) == "no such file"
    assert judge(claim(2, "n2"), RANK_0, taken, "lr differs") == "lr differs"
    assert judge(claim(1, launcher="A on n1"), RANK_0, taken, "lr differs") is None
    assert mistake([RANK_0, mine], CONFIGURATIONS) == "rank 1 on n1: no such file"


def test_a_place_belongs_to_who_came_first_unless_a_process_that_is_provably_ours_comes() -> None:
    # Two jobs of one configuration on one port; the second one's rank 2 is there first.
    stranger, late = claim(2, "n2", "B on n2", 2), claim(2, "n2", "A on n2", 2)
    assert judge(stranger, RANK_0, {0: RANK_0}, None) is None
    told = judge(late, RANK_0, {0: RANK_0, 2: stranger}, None)
    assert told == f"it belongs to another launch, and this launch has its own {stranger}"
    # And no node is half of one job and half of the other.
    assert judge(claim(3, "n2", "A on n2", 2), RANK_0, {0: RANK_0, 2: stranger}, None) == "it belongs to another launch"
    named = dataclasses.replace(RANK_0, launch="Slurm 7.0")
    ours = claim(2, "n2", launch="Slurm 7.0")
    assert judge(ours, named, {0: named, 2: dataclasses.replace(ours, pid=1)}, None) is None


def test_every_key_that_differs_is_named_with_both_values_and_who_has_them() -> None:
    other = [claim(rank, "n2", configuration="b") for rank in (2, 3)]
    assert unlike([RANK_0, claim(1), *other], CONFIGURATIONS) == (
        "optimizer.lr is 0.002 on rank 2-3 (n2) and 0.001 on rank 0 (n1); "
        "deepspeed.zero_optimization.x is 1 on rank 2-3 (n2) and not set on rank 0 (n1)"
    )
    assert unlike([RANK_0, claim(1)], CONFIGURATIONS) is None
    assert unlike([RANK_0, claim(1, size=3)], CONFIGURATIONS) == (
        "the number of processes is 3 on rank 1 (n1) and 4 on rank 0 (n1)"
    )


def test_differences_know_a_missing_key_from_null_and_true_from_1() -> None:
    found = differences({"a": None, "b": True, "c": 1}, {"b": 1, "c": 1.0, "d": None})
    assert [(each.key, each.mine, each.its) for each in found] == [
        ("a", None, ABSENT),
        ("b", True, 1),
        ("d", ABSENT, None),
    ]
