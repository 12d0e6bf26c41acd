"""The summary at the start: memory is what a step allocates, and every line says what the configuration asks for."""

from __future__ import annotations

import pytest

from tests.processes import run_distributed
from tests.train.startup_workers import held_and_estimated

CASES = [
    (0, "fp32", "auto", "normuon", "layer"),
    (0, "bf16", "bf16", "adamw", "layer"),
    (1, "fp32", "auto", "adamw", "layer"),
    (1, "bf16", "auto", "muon", "layer"),
    (2, "bf16", "auto", "muon", "folded"),
    (3, "bf16", "auto", "normuon", "layer"),
]
PADDING = 4096
"""Bytes by which flat buffers may be longer than their parameters: DeepSpeed pads each param group to a multiple of
some elements, and there are at most five groups."""


@pytest.fixture(scope="module")
def found() -> dict[tuple[object, ...], tuple[dict[str, int], dict[str, int]]]:
    first, second = run_distributed(2, held_and_estimated, CASES)
    assert first == second, "every rank tells the largest figures of all ranks"
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_the_memory_of_each_kind_is_what_a_step_allocates(
    found: dict[tuple[object, ...], tuple[dict[str, int], dict[str, int]]], case: tuple[object, ...]
) -> None:
    held, estimated = found[case]
    for kind, count in held.items():
        assert abs(estimated[kind] - count) <= PADDING, (kind, held, estimated)
