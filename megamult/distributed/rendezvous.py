"""Rendezvous of a launch: all its processes meet within a bounded time, or a message names those that are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megamult.distributed import environment, launcher
from megamult.distributed.claims import Claim
from megamult.distributed.reception import (
    CLAIMS,
    HEAR,
    MET,
    RANK_0,
    TELL_SECONDS,
    Reception,
    answer_key,
    claim_key,
    configuration_key,
    heard_key,
    refusal,
)

SECONDS = 45.0
"""Default number of seconds to wait for all processes. It is short enough that a host which is down is named within a
minute, counted from the start of the launcher."""


class RefusedError(Exception):
    """Rank 0 refused this process, which belongs to another launch, or has another configuration or version."""

    def __init__(self, message: str, configuration: bool) -> None:
        super().__init__(message)
        self.configuration = configuration
        """Whether the reason is the process's configuration or its version of megamult. If so, the same command would
        be refused again."""


class RanksMissingError(Exception):
    """Processes of this launch did not come together in time."""

    def __init__(self, message: str, rank_0_is_missing: bool = False) -> None:
        super().__init__(message)
        self.rank_0_is_missing = rank_0_is_missing


@dataclass(frozen=True)
class Meeting:
    """Result of a rendezvous: all processes of the launch are here."""

    store: Store
    """Store that the processes share. Its keys have a prefix that processes of other launches do not know."""
    machines: list[str]
    """Node of each rank (:func:`megamult.distributed.environment.machine`)."""

    def check_nodes(self, tensor: int) -> None:
        """Check that no tensor-parallel group, which is `tensor` consecutive ranks, spans nodes.

        Raises:
            ValueError: a group spans nodes. Every rank raises it.
        """
        for first in range(0, len(self.machines), tensor):
            group = self.machines[first : first + tensor]
            if len(set(group)) > 1:
                names = list(dict.fromkeys(each.split()[0] for each in group))
                fit = math.gcd(tensor, *Counter(self.machines).values())
                raise ValueError(
                    f"parallel.tensor is {tensor}: ranks {first} to {first + tensor - 1} run on {', '.join(names)}, "
                    f"and every layer's collectives would cross the network; choose parallel.tensor {fit}, which stays "
                    "inside a node, or allow groups that span nodes with parallel.tensor_across_nodes true"
                )


def meet(seconds: float, configuration: Mapping[str, Any] | None = None) -> Meeting:
    """Wait until every process of this launch has reached rank 0's store. Collective over all ranks.

    A process of another launch is refused and told which run refuses it. This launch goes on waiting for its own
    processes.

    Args:
        seconds: time to wait.
        configuration: flat configuration of the run (:func:`megamult.settings.flat`), which must be the same on all
            ranks.

    Raises:
        RanksMissingError: processes are missing. Every rank that reached rank 0 raises it, with a message that names
            the missing ranks and their hosts. A rank that cannot reach rank 0 raises it with a message that says so,
            and rank 0 raises it if its port is in use.
        RefusedError: rank 0 decided that this process is not part of its launch.
        ValueError: a rank reported a mistake (:func:`report_mistake`), or the configurations differ. The message names
            every key that differs. Every rank raises it.
    """
    deadline = time.monotonic() + seconds
    configuration = dict(configuration or {})
    claim = _claim(configuration)
    store = _store(seconds)
    if claim.rank == 0:
        met = Reception(store, claim, configuration).receive(seconds, deadline)
    else:
        number = _submit(store, claim, configuration)
        # Rank 0 may have started up to `seconds` after this rank, and then also waits for `seconds`.
        met = _answer(store, claim, number, time.monotonic() + 2 * seconds + HEAR.total_seconds())
    if met["problem"] is not None:
        raise ValueError(met["problem"])
    if met["missing"] is not None:
        raise RanksMissingError(met["missing"])
    shared = PrefixStore(met["name"], store)
    shared.set_timeout(_PATIENCE)
    return Meeting(shared, met["machines"])


def report_mistake(problem: str) -> None:
    """Report to rank 0, if it can be reached, that this rank cannot take part and why."""
    with contextlib.suppress(RanksMissingError, RuntimeError):
        _submit(_store(_REPORT_SECONDS), _claim({}, problem), {})


_REPORT_SECONDS = 15.0
"""Seconds to wait for rank 0, which may still be importing libraries when this rank has already failed."""


_PATIENCE = datetime.timedelta(minutes=30)
"""Time that a rank waits for keys of other ranks in the store after the rendezvous. Some ranks take longer to import
libraries."""


def _claim(configuration: Mapping[str, Any], problem: str | None = None) -> Claim:
    """Return the claim that describes this process to rank 0."""
    text = json.dumps(configuration, sort_keys=True)
    return Claim(
        rank=environment.rank(),
        size=environment.world_size(),
        host=environment.host(),
        pid=os.getpid(),
        machine=environment.machine(),
        launch=launcher.launch(),
        launcher=launcher.process(),
        siblings=launcher.siblings(),
        command=" ".join(sys.argv),
        configuration=hashlib.sha256(text.encode()).hexdigest(),
        problem=problem,
    )


def _submit(store: Store, claim: Claim, configuration: Mapping[str, Any]) -> int:
    """Submit a claim to rank 0, and return the number of the claim."""
    store.set(configuration_key(claim.configuration), json.dumps(configuration))
    number = int(store.add(CLAIMS, 1))
    store.set(claim_key(number), json.dumps(dataclasses.asdict(claim)))
    return number


def _store(seconds: float) -> Store:
    """Connect to the store that rank 0 or torchrun serves."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = environment.rank() == 0 and not environment.has_agent_store()
    deadline = time.monotonic() + seconds
    try:
        if not serves:
            _reach(address, port, deadline)
        store = _connect(address, port, max(1.0, deadline - time.monotonic()), serves)
    except (RuntimeError, OSError) as error:
        # The first line is torch's message, the others are the C++ stack.
        why = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise RanksMissingError(
                f"port {port} on {environment.host()} is in use{_by_whom(address, port)} ({why}): choose another one "
                "by the launcher's --master_port, or MASTER_PORT"
            ) from None
        if serves:
            raise RanksMissingError(
                f"rank 0 on {environment.host()} cannot serve {address}:{port} ({why}): let --master_addr or "
                "MASTER_ADDR name this host"
            ) from None
        raise RanksMissingError(
            f"rank {environment.rank()} on {environment.host()} did not reach {_server()} at {address}:{port} within "
            f"{seconds:.0f} s ({why}): see whether its host is up, whether its address is the one that --master_addr "
            "or MASTER_ADDR names, and whether a firewall closes the port",
            rank_0_is_missing=True,
        ) from None
    return _of_this_start(store)


def _of_this_start(store: Store) -> Store:
    """Return the store with the number of restarts as prefix of every key. torchrun's store outlives the processes that
    torchrun restarts, so without the prefix a restarted process would read the keys of the earlier start."""
    return PrefixStore(f"megamult/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _connect(address: str, port: int, seconds: float, serves: bool) -> Store:
    """Serve the store at an address if `serves` is true, else connect to it.

    Raises:
        OSError, RuntimeError: the store cannot be reached or served, or another program listens there.
    """
    found: list[Store | RuntimeError] = []

    def connect() -> None:
        timeout = datetime.timedelta(seconds=seconds)
        size = environment.world_size()
        try:
            found.append(TCPStore(address, port, size, is_master=serves, timeout=timeout, wait_for_workers=False))
        except RuntimeError as error:
            found.append(error)

    # torch would wait for ever for the greeting of a server that is not a store of torch. So a thread connects, and is
    # left behind if it takes too long.
    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(seconds + 1.0)
    if not found:
        raise OSError(f"the program that listens there is not torch's store: no greeting within {seconds:.0f} s")
    if isinstance(found[0], RuntimeError):
        raise found[0]
    return found[0]


def _by_whom(address: str, port: int) -> str:
    """Return words that name the megamult run which listens at an address; "" if another program listens there. The
    words continue "port P is in use"."""
    with contextlib.suppress(OSError, RuntimeError):
        store = _of_this_start(_connect(address, port, _ASK_SECONDS, serves=False))
        if store.check([RANK_0]):
            return f" by the run of {store.get(RANK_0).decode()}"
    return ""


_ASK_SECONDS = 3.0
"""Seconds to wait for the greeting of the program that listens at a port in use."""


def _reach(address: str, port: int, deadline: float) -> None:
    """Wait until a server listens at an address.

    torch's own retries are not used: their pauses grow, so that they can take up to twice the given time.

    Raises:
        OSError: no server listens there at the deadline.
    """
    tell = time.monotonic() + TELL_SECONDS if environment.local_rank() == 0 else math.inf
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(2.0, deadline - time.monotonic()))).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > tell:
            tell = math.inf
            print(f"waiting for {_server()} at {address}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _server() -> str:
    return "torchrun's store" if environment.has_agent_store() else "rank 0"


def _answer(store: Store, claim: Claim, number: int, deadline: float) -> dict[str, Any]:
    """Wait for rank 0's result and return it.

    Raises:
        RanksMissingError: rank 0 has not answered by the deadline, or has left.
        RefusedError: this process does not take part.
    """
    answer = answer_key(number)
    try:
        while not store.check([answer]):
            if store.check([MET]):
                break
            if time.monotonic() > deadline:
                raise RanksMissingError(
                    "the store was reached, but rank 0 has not answered: see rank 0's output", rank_0_is_missing=True
                )
            time.sleep(0.4)  # not shorter, because thousands of ranks ask the same store
        if store.check([answer]):
            told = json.loads(store.get(answer))
            raise RefusedError(told["why"], told["configuration"])
        met = dict(json.loads(store.get(MET)))
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise RanksMissingError(
            f"rank 0 left before all processes had come ({why}): see its output", rank_0_is_missing=True
        ) from None
    if number not in met["numbers"]:
        raise RefusedError(refusal(str(claim), met["by"], "rank 0's launch already has all of its processes"), False)
    store.set(heard_key(number), "")
    return met
