"""Ranks of a test are new processes, forked from a server that has the libraries, with this process' environment."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pytest

from tests import processes
from tests.processes import run_distributed

MODULES = {"torch", "deepspeed.runtime.engine", "megatron.core", "megamult.train.deepspeed_engine"}


def found() -> dict[str, Any]:
    """What a rank finds at its start, before it imports anything itself."""
    modules = MODULES & set(sys.modules)
    from tests import preload

    return {
        "modules": modules,
        "forked": os.getppid() == preload.SERVER,
        "process": os.getpid(),
        "variable": os.environ.get("MEGAMULT_TEST_LATE"),
        "further": os.environ.get("MEGAMULT_TEST_EARLY"),
        "threads": threading.active_count(),
        "ranks": [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")],
    }


def fails_on_rank_one() -> None:
    """Raise there; the other rank waits."""
    if os.environ["RANK"] == "1":
        raise KeyError("no such key")
    threading.Event().wait()


def test_every_rank_is_a_fresh_fork_of_a_server_that_has_imported_the_libraries() -> None:
    launches = [run_distributed(2, found, fast=True) for _ in range(2)]
    ranks = [rank for launch in launches for rank in launch]
    for rank in ranks:
        assert rank["forked"] and rank["threads"] == 1
        assert rank["modules"] == MODULES
    assert len({rank["process"] for rank in ranks}) == 4
    assert [rank["ranks"] for rank in launches[1]] == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


def test_ranks_have_the_environment_of_their_launch_not_of_the_servers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMULT_TEST_EARLY", "of the first launch")
    run_distributed(1, found, fast=True)
    monkeypatch.delenv("MEGAMULT_TEST_EARLY")
    monkeypatch.setenv("MEGAMULT_TEST_LATE", "of this launch")
    (rank,) = run_distributed(1, found, fast=True)
    assert (rank["variable"], rank["further"]) == ("of this launch", None)


def test_a_rank_that_raises_ends_the_launch_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*fails_on_rank_one.*KeyError: 'no such key'"):
        run_distributed(2, fails_on_rank_one, fast=True)


def test_fast_skips_a_test_that_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FAST", True)
    with pytest.raises(pytest.skip.Exception, match="not with --fast"):
        run_distributed(1, found)
