"""The summary at the start: memory is what a step allocates, and every line says what the configuration asks for."""

from __future__ import annotations

import pytest

from examples.benchmarks.plan_memory import ACTIVATIONS, PARTS
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


Found = tuple[dict[str, int], dict[str, int], dict[str, int]]


@pytest.fixture(scope="module")
def found() -> dict[tuple[object, ...], Found]:
    first, second = run_distributed(2, held_and_estimated, CASES)
    assert first == second, "every rank tells the largest figures of all ranks"
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_the_memory_of_each_kind_is_what_a_step_allocates(
    found: dict[tuple[object, ...], Found], case: tuple[object, ...]
) -> None:
    held, estimated, _ = found[case]
    for kind, parts in PARTS.items():
        expected = sum(estimated.get(part, 0) for part in parts)
        assert abs(expected - held[kind]) <= PADDING, (kind, held, estimated)


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_activations_are_what_a_forward_pass_keeps(
    found: dict[tuple[object, ...], Found], case: tuple[object, ...]
) -> None:
    held, _, planned = found[case]
    # Under DeepSpeed, the loss has a few more tensors of one element.
    assert planned[ACTIVATIONS] == pytest.approx(held[ACTIVATIONS], rel=0.01)


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_a_plan_without_processes_is_what_the_run_says_at_its_start(
    found: dict[tuple[object, ...], Found], case: tuple[object, ...]
) -> None:
    held, estimated, planned = found[case]
    assert held["cuts that the plan has otherwise"] == 0
    # The plan is of the first rank; which rank owns most rows of NorMuon's second moment is another matter.
    for kind in {*planned, *estimated} - {ACTIVATIONS}:
        more = PADDING if kind == "momentum" and case[3] == "normuon" else 0
        assert abs(planned.get(kind, 0) - estimated.get(kind, 0)) <= more, kind
