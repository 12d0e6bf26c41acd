"""Run a function on several gloo processes from a test, and get what each returned."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

REPOSITORY = Path(__file__).parents[1]

FAST = False
"""Whether tests that start processes are to be skipped; `tests/conftest.py` sets it."""


def starts_processes() -> None:
    """Skip the running test with `--fast`: whatever starts Python with torch in it, calls this first."""
    if FAST:
        pytest.skip("starts processes: not with --fast")


def free_port() -> int:
    """A TCP port that nobody listens on, of those that Linux gives to no outgoing connection (it takes 32768 and more):
    between here and the listener's start no other process of a test gets it by chance."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_distributed(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600.0,
    cuda: bool = False,
    fast: bool = False,
) -> list[Any]:
    """What `function(*args)` returned on each of `world_size` processes, by rank.

    Each process has RANK, WORLD_SIZE, MASTER_* set and one thread (so that results do not depend on how a sum was
    split over threads, and processes do not fight for cores). The function sets its groups up itself, with
    `megamult.distributed.start.initialize(tensor)`. `function` must be importable: a module's own function.

    On the CPU, whatever the machine has, unless `cuda` is true: then rank k computes on GPU k.

    Every process is new and has this process' environment variables. Those on the CPU are forked from one that has
    imported `tests/preload.py` and done nothing else, in a tenth of a second instead of eight; those on GPUs start
    afresh. With `--fast` the test is skipped, unless `fast` is true.

    Raises:
        AssertionError: a process raised; with its traceback.
    """
    if not fast:
        starts_processes()
    with tempfile.TemporaryDirectory() as folder:
        context: BaseContext = mp.get_context("spawn") if cuda else preloaded()
        port = free_port()
        processes = [
            context.Process(  # type: ignore[attr-defined]
                target=_child,
                args=(dict(os.environ), rank, world_size, port, folder, cuda, function, args),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + 5)  # peers may wait for the failed rank for ever
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        outcomes = [_read(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
        failures = [f"rank {r}:\n{o['error']}" for r, o in enumerate(outcomes) if o and "error" in o]
        assert not failures, "\n".join(failures)
        assert not alive, f"ranks {alive} did not finish within {timeout:.0f} s"
        missing = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        assert not missing, f"ranks {missing} died without a result (exit codes {[p.exitcode for p in processes]})"
        return [outcome["result"] for outcome in outcomes if outcome is not None]


def preloaded() -> BaseContext:
    """Start processes by forking a server that has imported `tests/preload.py`; it starts with the first of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    # Python 3.11's server does not search this process' paths. One that cannot import would go on without saying so.
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return context


def _read(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=False) if path.exists() else None


def _child(
    environment: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    cuda: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # a forked process has those of the server's start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cuda" if cuda else "cpu",
    )
    torch.set_num_threads(1)
    path = Path(folder) / f"{rank}.pt"
    try:
        outcome = {"result": function(*args)}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    torch.save(outcome, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    from megamult.distributed import start

    if "error" not in outcome:
        start.destroy()
    os._exit("error" in outcome)  # a peer may still wait in a collective: leave without the interpreter's clean-up
