"""Claims by which processes ask rank 0 for their ranks in a launch, and the rules by which rank 0 judges them.

The module does not communicate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamult.runtime.console import ranges
from megamult.settings import differences, shown

_COMMAND_CHARACTERS = 160


@dataclass(frozen=True)
class Claim:
    """Request of a process to be a rank of a launch, with what rank 0 must know about the process."""

    rank: int
    size: int
    """Number of processes that the launch has according to this process (WORLD_SIZE)."""
    host: str
    pid: int
    machine: str
    """Node that the process runs on (:func:`megamult.distributed.environment.machine`)."""
    launch: str
    """Unique name that a scheduler or user gave to the launch, the same on all its ranks; "" if there is none."""
    launcher: str
    """Unique name of the launcher process that started this process; "" if no known launcher did."""
    siblings: tuple[int, int]
    """(first rank, number of ranks) of the ranks that this launcher starts on its node."""
    command: str
    configuration: str
    """Digest of the process's resolved configuration."""
    problem: str | None = None
    """Reason why this process cannot take part, or None. A process with a problem claims its rank only to report it."""

    def __str__(self) -> str:
        short = self.command[:_COMMAND_CHARACTERS] + ("..." if len(self.command) > _COMMAND_CHARACTERS else "")
        return f"rank {self.rank} on {self.host} (process {self.pid}: {short})"

    def starts(self, rank: int) -> bool:
        """Return whether the launcher of this process also starts the process with rank `rank`."""
        first, count = self.siblings
        return first <= rank < first + count


def same_launch(one: Claim, other: Claim) -> bool | None:
    """Return whether two processes belong to one launch, or None if their claims do not show it."""
    if one.launcher and one.launcher == other.launcher:
        return True
    if one.launch or other.launch:
        return one.launch == other.launch
    # A launcher starts every rank of its node itself. A process that claims one of these ranks and was not started by
    # this launcher is therefore of another launch.
    if (one.launcher and one.starts(other.rank)) or (other.launcher and other.starts(one.rank)):
        return False
    return None


def judge(claim: Claim, rank_0: Claim, taken: Mapping[int, Claim], configuration: str | None) -> str | None:
    """Return why a process is refused, or None if the process is accepted as the rank that it claims.

    A process that provably belongs to rank 0's launch is never refused, even if another process has already been
    accepted for the same rank. If such a process has another configuration or reports a problem, this is a mistake of
    the whole launch (:func:`mistake`).

    Args:
        claim: claim of the process.
        rank_0: claim of rank 0, which judges.
        taken: accepted claims by rank, including rank 0's own.
        configuration: text about the differences between the process's configuration and rank 0's, or None if there
            are none.
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
    """Return a text that names every configuration key whose value differs between processes, with the values and the
    ranks, or None if no value differs. The number of processes (`Claim.size`) is compared like a key.

    Args:
        claims: claims of the processes; the first is rank 0's.
        configurations: mapping from each digest in the claims (`Claim.configuration`) to the flat configuration
            (:func:`megamult.settings.flat`) with this digest.
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
    """Return a text about the mistake that ends a launch, or None if there is none. A mistake is a problem that a rank
    reported, or a difference between configurations. The arguments are those of :func:`unlike`."""
    for claim in claims:
        if claim.problem is not None:
            return f"rank {claim.rank} on {claim.host}: {claim.problem}"
    different = unlike(claims, configurations)
    return None if different is None else f"the ranks were started with different configurations: {different}. {REMEDY}"


REMEDY = (
    "Start every rank with the same command and the same files. If the ranks belong to two runs, give each run its own "
    "port (the launcher's --master_port, or MASTER_PORT)"
)

_SIZE = "the number of processes"
"""Key under which the number of processes is compared, like a key of the configuration."""


def _listed(claims: Sequence[Claim]) -> str:
    hosts = dict.fromkeys(claim.host for claim in claims)
    return f"rank {ranges([claim.rank for claim in claims])} ({', '.join(hosts)})"
