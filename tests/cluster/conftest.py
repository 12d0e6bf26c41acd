"""Tests on hosts of their own on one machine: those that take minutes run with `--cluster`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what was not asked for."""
    if config.getoption("--cluster"):
        return
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --cluster, or tests/cluster/run_all.sh"))
