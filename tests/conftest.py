"""Settings of all tests: one thread per process, no GPU unless a test asks for it, and how two workers share them."""

import os
from pathlib import Path, PurePosixPath

import pytest

# Before torch is imported anywhere: child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

ONE_LAUNCH = ("tests/models", "tests/multipliers")
"""Folders in which all tests read the results of one launch."""


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, keep the tests of a file on one worker: their fixtures launch once."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = PurePosixPath(item.nodeid.partition("::")[0])
        group = file.parent if str(file.parent) in ONE_LAUNCH else file
        item.add_marker(pytest.mark.xdist_group(str(group)))
