"""All processes of a launch meet, within a bounded time, or say who did not come."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import secrets
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megamult import environment, launcher
from megamult.console import ranges

SECONDS = 45.0
"""For which to wait, if nothing else is asked for: with the launcher's own start a host that is down is named within a
minute."""


class NobodyThere(Exception):
    """Processes of this launch did not come together in time."""

    def __init__(self, message: str, rank_0_is_missing: bool = False) -> None:
        super().__init__(message)
        self.rank_0_is_missing = rank_0_is_missing


@dataclass(frozen=True)
class Meeting:
    """All processes of a launch."""

    store: Store
    """That they share."""
    machines: list[str]
    """Of each rank (:func:`megamult.environment.machine`)."""

    def check_nodes(self, tensor: int) -> None:
        """Refuse tensor-parallel groups of `tensor` consecutive ranks that span nodes.

        Raises:
            ValueError: one does; on every rank.
        """
        for first in range(0, len(self.machines), tensor):
            group = self.machines[first : first + tensor]
            if len(set(group)) > 1:
                names = list(dict.fromkeys(each.split()[0] for each in group))
                fit = math.gcd(tensor, *Counter(self.machines).values())
                raise ValueError(
                    f"parallel.tensor is {tensor}: ranks {first} to {first + tensor - 1} run on {', '.join(names)}, "
                    f"and every layer's collectives would cross the network; choose parallel.tensor {fit}, which stays "
                    "inside a node, or allow it by parallel.tensor_across_nodes true"
                )


def meet(seconds: float) -> Meeting:
    """Wait until every process has come to rank 0's store. Collective over all ranks.

    Args:
        seconds: for which to wait.

    Raises:
        NobodyThere: on every rank that is here: who did not come, on which hosts; on a rank that finds nobody: that.
        ValueError: on every rank: what one excused itself with.
    """
    rank, size = environment.rank(), environment.world_size()
    deadline = time.monotonic() + seconds
    store = _store(seconds)
    _come(store, machine=environment.machine())
    if rank == 0:
        missing = _missing(store, size, min(deadline, time.monotonic() + _TELL_SECONDS))
        if missing and time.monotonic() < deadline:
            print(f"waiting for {_who(missing)}, up to {seconds:.0f} s in all", file=sys.stderr, flush=True)
            missing = _missing(store, size, deadline)
        here = [each for each in range(size) if each not in missing]
        came = [json.loads(value) for value in store.multi_get([f"here/{each}" for each in here])]
        name = secrets.token_hex(8)
        store.set("met", json.dumps({"missing": missing, "came": came, "name": name}))
        # The store goes with this process: it may leave only once all others have heard.
        with contextlib.suppress(RuntimeError):
            takes_part = [f"heard/{each}" for each, said in zip(here, came, strict=True) if each and "machine" in said]
            store.wait(takes_part, _HEAR)
            # Under torchrun the store may serve these ranks once more, without a new count of restarts.
            for key in ["met", *takes_part, *(f"here/{each}" for each in here)]:
                store.delete_key(key)
        met: dict[str, Any] = {"missing": missing, "came": came, "name": name}
    else:
        # Rank 0 may have begun later, and waits for as long.
        met = _heard(store, time.monotonic() + 2 * seconds + _HEAR.total_seconds())
        store.set(f"heard/{rank}", "")
    if met["missing"]:
        raise NobodyThere(
            f"{len(met['missing'])} of {size} processes did not come within {seconds:.0f} s "
            f"(parallel.rendezvous_seconds): {_who(met['missing'])}; see whether the host is up and what its own "
            "output says"
        )
    for each in met["came"]:
        if "problem" in each:
            raise ValueError(each["problem"])
    shared = PrefixStore(met["name"], store)
    shared.set_timeout(_PATIENCE)
    return Meeting(shared, [each["machine"] for each in met["came"]])


def excuse(problem: str) -> None:
    """Come in order to say that this rank cannot take part, if rank 0 is there to hear it."""
    with contextlib.suppress(NobodyThere, RuntimeError):
        _come(_store(_EXCUSE_SECONDS), problem=f"rank {environment.rank()} on {environment.host()}: {problem}")


_EXCUSE_SECONDS = 15.0
"""Rank 0 may still be importing what this one did not get to."""


_PATIENCE = datetime.timedelta(minutes=30)
"""For what ranks that have met ask the store: some import longer than others."""

_TELL_SECONDS = 15.0
"""After which a rank that still waits says for whom."""

_HEAR = datetime.timedelta(seconds=10)
"""For which rank 0 waits until what it has found is heard."""


def _come(store: Store, **what: str) -> None:
    store.set(f"here/{environment.rank()}", json.dumps(what))


def _store(seconds: float) -> Store:
    """Rank 0's, or torchrun's own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = environment.rank() == 0 and not environment.has_agent_store()
    deadline = time.monotonic() + seconds
    try:
        if not serves:
            _reach(address, port, deadline)
        store = TCPStore(
            address,
            port,
            environment.world_size(),
            is_master=serves,
            timeout=datetime.timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        # torch's message goes on with the C++ stack.
        why = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise NobodyThere(
                f"port {port} on {environment.host()} is in use ({why}): choose another one by the launcher's "
                "--master_port, or MASTER_PORT"
            ) from None
        raise NobodyThere(
            f"rank {environment.rank()} on {environment.host()} did not reach rank 0 at {address}:{port} within "
            f"{seconds:.0f} s ({why}): see whether rank 0's host is up, whether its address is the one that "
            "--master_addr or MASTER_ADDR names, and whether a firewall closes the port",
            rank_0_is_missing=True,
        ) from None
    # torchrun's store outlives the processes that it starts again.
    return PrefixStore(f"megamult/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reach(address: str, port: int, deadline: float) -> None:
    """Until somebody listens there. torch's own retries wait longer and longer, up to twice as long as it was told.

    Raises:
        OSError: nobody does by then.
    """
    tell = time.monotonic() + _TELL_SECONDS if environment.local_rank() == 0 else math.inf
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(2.0, deadline - time.monotonic()))).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > tell:
            tell = math.inf
            whom = "torchrun's store" if environment.has_agent_store() else "rank 0"
            print(f"waiting for {whom} at {address}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _missing(store: Store, size: int, deadline: float) -> list[int]:
    """The ranks that have not come by then."""
    keys = [f"here/{rank}" for rank in range(size)]
    return [] if _wait(store, keys, deadline) else [rank for rank, key in enumerate(keys) if not store.check([key])]


def _heard(store: Store, deadline: float) -> dict[str, Any]:
    """What rank 0 has found."""
    try:
        if not _wait(store, ["met"], deadline):
            raise NobodyThere("rank 0 was there, and has said nothing since", rank_0_is_missing=True)
        return dict(json.loads(store.get("met")))
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise NobodyThere(f"rank 0 has left before all had come ({why})", rank_0_is_missing=True) from None


def _wait(store: Store, keys: list[str], deadline: float) -> bool:
    """Until all of them are set; False: not by then. torch's own wait is not ended by Ctrl-C, and prints a warning."""
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _who(ranks: list[int]) -> str:
    """Ranks with their hosts, where those are known."""
    hosts = launcher.hosts_of_ranks()
    named = sorted({hosts[rank] for rank in ranks if rank in hosts})
    return f"rank {ranges(ranks)}{' on ' + ', '.join(named) if named else ''}"
