"""One launch of four processes for all tests of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.models.workers import run_all
from tests.processes import run_distributed

Ranks = Callable[[int, str], list[Any]]


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """ranks(tensor, what): the outcome on each rank at that tensor-parallel size of `loss`, `gpt` or, only at size 1,
    `symmetric`."""
    outcomes = run_distributed(4, run_all)
    return lambda tensor, what: [outcomes[rank][tensor][what] for rank in range(tensor)]
