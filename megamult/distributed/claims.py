"""Claims of processes to be ranks of a launch, and the rules that decide which belong together; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamult.runtime.console import ranges
from megamult.settings import differences, shown

_COMMAND_CHARACTERS = 160


@dataclass(frozen=True)
class Claim:
    """A process that wants to be a rank of a launch."""

    rank: int
    size: int
    """Number of processes of its launch (WORLD_SIZE)."""
    host: str
    pid: int
    machine: str
    """Node that the process runs on (:func:`megamult.distributed.environment.machine`)."""
    launch: str
    """Unique name that a scheduler gave to the launch, the same on all its ranks; "" if there is none."""
    launcher: str
    """Launcher's process that started this one, by machine and start time; "" if no known launcher did."""
    siblings: tuple[int, int]
    """(first rank, number of ranks) that this launcher starts on its node."""
    command: str
    configuration: str
    """Digest of the resolved configuration."""
    problem: str | None = None
    """Reason why this process cannot take part, if it comes only to report that."""

    def __str__(self) -> str:
        short = self.command[:_COMMAND_CHARACTERS] + ("..." if len(self.command) > _COMMAND_CHARACTERS else "")
        return f"rank {self.rank} on {self.host} (process {self.pid}: {short})"

    def starts(self, rank: int) -> bool:
        """Tell whether the launcher of this process starts that rank."""
        first, count = self.siblings
        return first <= rank < first + count


def same_launch(one: Claim, other: Claim) -> bool | None:
    """Tell whether two processes belong to one launch; None: their claims do not tell."""
    if one.launcher and one.launcher == other.launcher:
        return True
    if one.launch or other.launch:
        return one.launch == other.launch
    # A launcher starts every rank of its node itself, so a process that it did not start is none of them.
    if (one.launcher and one.starts(other.rank)) or (other.launcher and other.starts(one.rank)):
        return False
    return None


def judge(claim: Claim, rank_0: Claim, taken: Mapping[int, Claim], configuration: str | None) -> str | None:
    """Return why a process is refused; None: it becomes the rank, even if another process of its launch was it before.

    A process that provably belongs to rank 0's launch is never refused: if its configuration differs or it reports a
    problem, that is a mistake of the whole launch (:func:`mistake`).

    Args:
        rank_0: the claim of the rank that judges.
        taken: rank -> accepted claim, rank 0's own included.
        configuration: differences between its configuration and rank 0's, as text; None: there are none.
    """
    related = same_launch(rank_0, claim)
    if related:
        return None
    if related is None:
        if claim.problem is not None:
            return claim.problem
        if configuration is not None:
            return configuration
    stranger = "it belongs to another launch"
    if claim.rank in taken:
        return f"{stranger}, and this launch has its own {taken[claim.rank]}"
    if related is False or any(same_launch(other, claim) is False for other in taken.values()):
        return stranger
    return None


def unlike(claims: Sequence[Claim], configurations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Name every key whose value is not the same on all these processes, with the values and ranks; None: all agree.

    Args:
        claims: of the processes, rank 0's first.
        configurations: digest -> flat configuration.
    """
    groups: dict[tuple[int, str], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((claim.size, claim.configuration), []).append(claim)
    first = claims[0]
    mine = {_SIZE: first.size, **configurations[first.configuration]}
    own: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for (size, digest), members in groups.items():
        for each in differences(mine, {_SIZE: size, **configurations[digest]}):
            own[each.key] = shown(each.mine)
            others.setdefault(each.key, []).append(f"{shown(each.its)} on {_listed(members)}")
    said = [f"{key} is {', '.join(others[key])} and {own[key]} on rank 0 ({first.host})" for key in others]
    return "; ".join(said) or None


def mistake(claims: Sequence[Claim], configurations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the mistake of a launch whose ranks have come; None: there is none. Arguments: those of :func:`unlike`."""
    for claim in claims:
        if claim.problem is not None:
            return f"rank {claim.rank} on {claim.host}: {claim.problem}"
    different = unlike(claims, configurations)
    return None if different is None else f"the ranks were started with different configurations: {different}. {REMEDY}"


REMEDY = (
    "Start every rank with the same command and the same files, and another run with another port (the launcher's "
    "--master_port, or MASTER_PORT)"
)

_SIZE = "the number of processes"
"""Compared like a key of the configuration."""


def _listed(claims: Sequence[Claim]) -> str:
    hosts = dict.fromkeys(claim.host for claim in claims)
    return f"rank {ranges([claim.rank for claim in claims])} ({', '.join(hosts)})"
