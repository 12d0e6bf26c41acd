"""Every sample of a validation set counts once, whatever the batch, the ranks, or how few samples there are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamult.models.common.loss import weighted
from tests.processes import run_distributed
from tests.train.evaluation_workers import SETS, Layout, evaluated, plain_losses

ONE = [Layout(micro=16), Layout(micro=4), Layout(micro=1, zero=3)]
TWO = [
    Layout(world=2, micro=8, zero=2),
    Layout(world=2, micro=4, zero=3),
    Layout(world=2, tensor=2, sequence=True, micro=16, zero=1),
    Layout(world=2, micro=2, zero=1, implementation="folded", recompute=True),
]
"""Global batches of 16. At micro 8 and two data-parallel ranks, one rank has no sample of the second set."""


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    return run_distributed(1, plain_losses, Layout())[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def by_two(folder: Path) -> list[list[tuple[dict[str, float], list[int]]]]:
    return run_distributed(2, evaluated, TWO, folder)


def check(record: dict[str, float], expected: dict[str, float]) -> None:
    assert record.keys() == {"valid_loss", *(f"valid/{name}/loss" for name in SETS)}
    for name, loss in expected.items():
        # Sums in fp32 of another order, in the matrix products of other batches: a few 1e-7. One of 17 samples that
        # counts twice changes the mean by some 1e-3.
        assert record[f"valid/{name}/loss"] == pytest.approx(loss, rel=1e-6)
    assert record["valid_loss"] == pytest.approx(sum(expected.values()) / 2, rel=1e-6)


def test_on_one_rank_the_loss_is_that_of_a_plain_loop(expected: dict[str, float]) -> None:
    for record, seen in run_distributed(1, evaluated, ONE)[0]:
        check(record, expected)
        assert set(range(17)) <= set(seen)


@pytest.mark.parametrize(
    "number", range(len(TWO)), ids=lambda number: f"micro{TWO[number].micro}-tp{TWO[number].tensor}"
)
def test_on_two_ranks_too(
    number: int, expected: dict[str, float], by_two: list[list[tuple[dict[str, float], list[int]]]]
) -> None:
    (first, seen), (second, others) = (rank[number] for rank in by_two)
    assert first == second
    check(first, expected)
    real = [index for index in seen + others if index < 17]
    assert sorted(real) == list(range(17)), "each is read once"


def test_two_named_sets_are_two_curves_and_their_mean(
    folder: Path, by_two: list[list[tuple[dict[str, float], list[int]]]]
) -> None:
    (line,) = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert {key: value for key, value in record.items() if key != "time"} == {"step": 0, **by_two[0][0][0]}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"valid/loss", "valid/speeches/loss", "valid/code/loss"}
    for tag, key in (("valid/loss", "valid_loss"), ("valid/code/loss", "valid/code/loss")):
        assert events.Scalars(tag)[0].value == pytest.approx(record[key], rel=1e-6)


def test_a_sample_of_weight_0_does_not_count_even_if_its_loss_is_not_a_number() -> None:
    entropy = torch.tensor([[1.0, math.nan, 3.0], [3.0, math.inf, 5.0]])
    assert float(weighted(entropy, torch.tensor([0.25, 0.0, 0.75]).double())) == 0.25 * 2 + 0.75 * 4
    assert math.isnan(float(weighted(entropy, torch.tensor([0.25, 0.5, 0.25]).double())))
