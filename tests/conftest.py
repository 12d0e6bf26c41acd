"""Settings of all tests: one thread per process, no GPU unless a test asks for it."""

import os

import pytest

# Before torch is imported anywhere: child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cluster`: see tests/cluster/conftest.py."""
    parser.addoption("--cluster", action="store_true", help="run the tests marked `cluster` too, which take minutes")
