"""Tests on hosts of their own on one machine: those that take minutes run with `--cluster`, none with `--fast`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what was not asked for."""
    for item in items:
        if config.getoption("--fast") and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="starts processes: not with --fast"))
        elif item.get_closest_marker("cluster") and not config.getoption("--cluster"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --cluster, or tests/cluster/run_all.sh"))
