"""One launch of four processes for all tests of the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.multipliers.cases import LayerCase
from tests.multipliers.workers import run_all
from tests.processes import run_distributed

ByRank = Callable[[str, LayerCase], list[Any]]


@pytest.fixture(scope="session")
def by_rank() -> ByRank:
    """by_rank(run, case): what the run returned on each rank of the case."""
    outcomes = run_distributed(4, run_all)
    return lambda run, case: [outcomes[rank][run, case] for rank in range(case.tensor)]
