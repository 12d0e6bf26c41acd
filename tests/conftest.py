"""Settings of all tests: one thread per process, no GPU unless a test asks for it, and how workers share them."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

# Before torch is imported anywhere: child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
if "MEGAMULT_CACHE_DIR" not in os.environ:  # workers inherit it, so that all choose the same methods of Newton-Schulz
    os.environ["MEGAMULT_CACHE_DIR"] = tempfile.mkdtemp(prefix="megamult_cache_")
    atexit.register(shutil.rmtree, os.environ["MEGAMULT_CACHE_DIR"], ignore_errors=True)

ONE_LAUNCH = ("tests/models", "tests/multipliers")
"""Folders in which all tests read the results of one launch."""

LONG = (
    "tests/checkpoint/test_resume.py",
    "tests/cluster/test_two_hosts.py",
    "tests/test_muon_invariance.py",
    "tests/test_invariance.py",
    "tests/checkpoint/test_interrupted.py",
    "tests/runtime/test_killed_rank.py",
)
"""Files that workers begin with, so that they end at about the same time: half a minute and more each."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFIX of a small corpus, made once, which no test changes; see `tests.train.command.make_corpus`."""
    from tests.train.command import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cluster`: see tests/cluster/conftest.py. `--fast`: see `tests.processes.starts_processes`."""
    parser.addoption("--cluster", action="store_true", help="run the tests marked `cluster` too, which take minutes")
    parser.addoption("--fast", action="store_true", help="skip tests that start processes, except one launch of ranks")


def pytest_configure(config: pytest.Config) -> None:
    """Pass `--fast` on."""
    from tests import processes  # imports torch

    processes.FAST = config.getoption("--fast")


def together(nodeid: str) -> str:
    """What a test shares its launches with: its file, or its folder."""
    file = PurePosixPath(nodeid.partition("::")[0])
    return str(file.parent if str(file.parent) in ONE_LAUNCH else file)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first where there are several workers."""
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        order = {file: number for number, file in enumerate(LONG)}
        items.sort(key=lambda item: order.get(together(item.nodeid), len(LONG)))  # keeps the order of all others


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep tests that share launches on one worker. (pytest-xdist 3.8's own groups do not reach pytest 9.2's ids.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByLaunch(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    return ByLaunch(config, log)
