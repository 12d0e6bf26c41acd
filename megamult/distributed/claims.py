"""Claims to a place in a launch: what a process says of itself, and which of them belong together; pure functions."""

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
    """The node that it runs on (:func:`megamult.distributed.environment.machine`)."""
    launch: str
    """The name that a scheduler gave to the launch: equal on all its ranks and unlike any other's; "" if none did."""
    launcher: str
    """The launcher's process that started it, by machine and start time; "" if that is no launcher that is known."""
    siblings: tuple[int, int]
    """First and number of the ranks that this launcher starts on its node."""
    command: str
    configuration: str
    """Digest of the resolved configuration."""
    problem: str | None = None
    """Why this process cannot take part, where it comes only to say that."""

    def __str__(self) -> str:
        short = self.command[:_COMMAND_CHARACTERS] + ("..." if len(self.command) > _COMMAND_CHARACTERS else "")
        return f"rank {self.rank} on {self.host} (process {self.pid}: {short})"

    def starts(self, rank: int) -> bool:
        """Whether the launcher of this process starts that rank."""
        first, count = self.siblings
        return first <= rank < first + count


def same_launch(one: Claim, other: Claim) -> bool | None:
    """Whether two processes belong to one launch; None: nothing that they know of themselves tells."""
    if one.launcher and one.launcher == other.launcher:
        return True
    if one.launch or other.launch:
        return one.launch == other.launch
    # A launcher starts each rank of its node itself: nobody else's process is one of them.
    if (one.launcher and one.starts(other.rank)) or (other.launcher and other.starts(one.rank)):
        return False
    return None


def judge(claim: Claim, rank_0: Claim, taken: Mapping[int, Claim], configuration: str | None) -> str | None:
    """Why a process is refused; None: it takes its place, also if another process of its launch had it before.

    A process that provably belongs to rank 0's launch is never refused: a configuration or a problem of its own is a
    mistake of the whole launch (:func:`mistake`).

    Args:
        rank_0: the claim of the rank that judges.
        taken: rank -> claim, of those that have been let in, rank 0's own among them.
        configuration: what its configuration differs in from rank 0's, as text; None: nothing.
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
    """Every key that these processes do not all have the same value of, with the values and who has them; None: all do.

    Args:
        claims: rank 0's first.
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
    """What is wrong with a launch whose ranks have come; None: nothing. Arguments as of :func:`unlike`."""
    for claim in claims:
        if claim.problem is not None:
            return f"rank {claim.rank} on {claim.host}: {claim.problem}"
    different = unlike(claims, configurations)
    return None if different is None else f"the ranks were started with different configurations: {different}. {REMEDY}"


REMEDY = (
    "Start every rank with the same command and the same files; give another run another port (the launcher's "
    "--master_port, or MASTER_PORT)"
)

_SIZE = "the number of processes"
"""Compared like a key of the configuration."""


def _listed(claims: Sequence[Claim]) -> str:
    hosts = dict.fromkeys(claim.host for claim in claims)
    return f"rank {ranges([claim.rank for claim in claims])} ({', '.join(hosts)})"
