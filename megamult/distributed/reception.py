"""Rank 0's part of the rendezvous: read the claims by which processes ask for their ranks, refuse processes of other
launches, announce who takes part."""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from megamult.distributed import environment, launcher
from megamult.distributed.claims import REMEDY, Claim, judge, mistake, same_launch, unlike
from megamult.runtime.console import ranges

CLAIMS = "claims"
"""Key of the number of claims submitted so far."""

MET = "met"
"""Key of the result of the rendezvous, which rank 0 writes when it has stopped waiting for processes."""

RANK_0 = "rank 0"
"""Key of the text that describes rank 0. Another run that finds the port in use reads the text, and tells its user
which run uses the port."""

HEAR = datetime.timedelta(seconds=10)
"""Longest time that rank 0 waits for all ranks to read its result."""

TELL_SECONDS = 15.0
"""Seconds after which a rank that is still waiting says what it waits for."""

_PORT = "Give this run another port (the launcher's --master_port, or MASTER_PORT)"

_ANOTHER_VERSION = "it runs another version of megamult: use the same on all nodes"


def claim_key(number: int) -> str:
    """Return the store's key of the claim with this number."""
    return f"claim/{number}"


def answer_key(number: int) -> str:
    """Return the store's key of the refusal of the claim with this number."""
    return f"answer/{number}"


def heard_key(number: int) -> str:
    """Return the store's key by which the process of an accepted claim confirms that it has read the result (`MET`)."""
    return f"heard/{number}"


def configuration_key(digest: str) -> str:
    """Return the store's key of the flat configuration (:func:`megamult.settings.flat`) with this digest."""
    return f"configuration/{digest}"


def refusal(claim: str, by: str, why: str, configuration: bool = False) -> str:
    """Return the message for a process that may not take part.

    Args:
        claim: text that describes the process.
        by: text that describes rank 0.
        why: reason for the refusal.
        configuration: true if the reason is the process's configuration, its version of megamult or a problem that it
            reported; false if the process belongs to another launch. It selects the remedy at the end of the message.
    """
    return f"{claim} came to the port of {by}, which refuses it: {why}. {REMEDY if configuration else _PORT}"


class Reception:
    """Receiver and judge, on rank 0, of the claims that processes submit.

    Args:
        store: store to which the processes submit their claims.
        claim: rank 0's own claim.
        configuration: rank 0's flat configuration (:func:`megamult.settings.flat`).
    """

    def __init__(self, store: Store, claim: Claim, configuration: Mapping[str, Any]) -> None:
        self._store, self._claim = store, claim
        self._configurations: dict[str, Mapping[str, Any]] = {claim.configuration: configuration}
        self._taken: dict[int, Claim] = {0: claim}
        self._numbers: dict[int, int] = {}  # rank -> number of the accepted claim
        self._refused: list[tuple[Claim, str]] = []  # for another configuration or a problem
        self._unread: set[int] = set()
        self._read = 0
        store.set(RANK_0, str(claim))

    def receive(self, seconds: float, deadline: float) -> dict[str, Any]:
        """Wait for all ranks until the deadline, and announce which processes take part.

        Args:
            seconds: length of the whole wait, for messages.
            deadline: time at which the wait ends, as a value of time.monotonic().

        Returns:
            Dictionary with these keys:
            name: unique token, which prefixes the keys of this launch in the store after the rendezvous.
            numbers: serial numbers of the accepted claims. A claim is the request of a process for its rank.
            machines: node of each rank, or None if a rank is missing.
            problem: mistake that ends the launch, or None.
            missing: text that names the ranks that did not come, or None.
            by: text that describes rank 0.
        """
        tell = min(deadline, time.monotonic() + TELL_SECONDS)
        while missing := self._missing():
            now = time.monotonic()
            if now > deadline:
                break
            if now > tell:
                tell = deadline
                print(f"waiting for {_who(missing)}, up to {seconds:.0f} s in all", file=sys.stderr, flush=True)
            time.sleep(0.2)
        return self._conclude(missing, seconds)

    def _missing(self) -> list[int]:
        """Judge all new claims, then return the ranks for which no process has been accepted."""
        count = int(self._store.add(CLAIMS, 0))
        self._unread |= set(range(self._read + 1, count + 1))
        self._read = count
        # A process increments the count before it writes its claim, so a claim may not be there yet.
        for number in sorted(self._unread):
            if self._store.check([claim_key(number)]):
                self._unread.discard(number)
                came = json.loads(self._store.get(claim_key(number)))
                try:
                    claim = Claim(**came | {"siblings": tuple(came["siblings"])})
                except (TypeError, KeyError):
                    name = f"rank {came.get('rank')} on {came.get('host')} (process {came.get('pid')})"
                    self._refuse(number, name, _ANOTHER_VERSION, True)
                else:
                    self._judge(number, claim)
        return [rank for rank in range(self._claim.size) if rank not in self._taken]

    def _judge(self, number: int, claim: Claim) -> None:
        different = None
        if claim.configuration not in self._configurations:
            text = self._store.get(configuration_key(claim.configuration))
            self._configurations[claim.configuration] = json.loads(text)
        if claim.problem is None:
            different = unlike([self._claim, claim], self._configurations)
        why = judge(claim, self._claim, self._taken, different)
        if why is None:
            before = self._numbers.get(claim.rank)
            if before is not None and same_launch(self._taken[claim.rank], claim) is not True:
                self._refuse(
                    before,
                    str(self._taken[claim.rank]),
                    "a process of rank 0's own launch has claimed the same rank",
                    False,
                )
            self._taken[claim.rank], self._numbers[claim.rank] = claim, number
            return
        own_fault = why in (claim.problem, different)
        self._refuse(number, str(claim), why, own_fault)
        if own_fault:
            self._refused.append((claim, why))

    def _refuse(self, number: int, claim: str, why: str, configuration: bool) -> None:
        print(f"refused {claim}: {why}", file=sys.stderr, flush=True)
        told = {"why": refusal(claim, str(self._claim), why, configuration), "configuration": configuration}
        self._store.set(answer_key(number), json.dumps(told))

    def _conclude(self, missing: Sequence[int], seconds: float) -> dict[str, Any]:
        came = [self._taken[rank] for rank in sorted(self._taken)]
        problem, absent = mistake(came, self._configurations), None
        if missing and problem is None:
            absent = (
                f"{len(missing)} of {self._claim.size} processes did not come within {seconds:.0f} s "
                f"(parallel.rendezvous_seconds): {_who(missing)}. See whether their hosts "
                "are up, and read the output of these processes"
            )
            if at_fault := [f"{claim}: {why}" for claim, why in self._refused if claim.rank in missing]:
                problem = (
                    f"{_who(missing)} did not come within {seconds:.0f} s; rank 0 refused {'; '.join(at_fault)}. "
                    f"{REMEDY}"
                )
        met = {
            "name": secrets.token_hex(8),
            "numbers": sorted(self._numbers.values()),
            "machines": None if missing else [claim.machine for claim in came],
            "problem": problem,
            "missing": absent,
            "by": str(self._claim),
        }
        self._store.set(MET, json.dumps(met))
        # The store ends with this process, so this process must stay until all others have read the result.
        takes_part = [heard_key(number) for rank, number in self._numbers.items() if self._taken[rank].problem is None]
        with contextlib.suppress(RuntimeError):
            self._store.wait(takes_part, HEAR)
        if environment.has_agent_store():
            # torchrun's store may serve restarted ranks without counting the restart, so the keys must go. A store that
            # rank 0 serves keeps them, so that a process of another launch that comes later is told why it is refused.
            for number in range(1, self._read + 1):
                for key in (claim_key(number), answer_key(number), heard_key(number)):
                    self._store.delete_key(key)
            self._store.delete_key(MET)
            self._store.delete_key(CLAIMS)
        return met


def _who(ranks: Sequence[int]) -> str:
    """Return a text that names ranks, and their hosts if these are known."""
    hosts = launcher.hosts_of_ranks()
    named = sorted({hosts[rank] for rank in ranks if rank in hosts})
    return f"rank {ranges(ranks)}{' on ' + ', '.join(named) if named else ''}"
