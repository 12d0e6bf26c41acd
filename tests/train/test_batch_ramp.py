"""A run whose batch grows takes the steps that are made by hand of the same batches; sizes are Megatron's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megamult.config import Config
from megamult.optim.config import OptimizerConfig
from megamult.train.config import BatchRamp, TrainConfig
from megamult.train.schedule import Schedule
from tests.processes import run_distributed
from tests.train.ramp_workers import Ramp, Steps, both

FP32 = [
    Ramp(zero=0),
    Ramp(zero=1, optimizer="muon", implementation="folded"),
    Ramp(zero=2, scaled=False),
    Ramp(zero=2, optimizer="muon", constant=True, accumulation=4),
    Ramp(zero=3, implementation="folded"),
]
BF16 = [Ramp(zero=stage, dtype="bf16") for stage in (0, 1, 2, 3)]
"""Every class of DeepSpeed's that accumulates gradients is among the two lists."""


def _id(case: Ramp) -> str:
    scaling = "sqrt" if case.scaled else "none"
    return f"zero{case.zero}-{case.dtype}-{case.optimizer}-{case.implementation}-{scaling}{'-constant' * case.constant}"


@pytest.fixture(scope="module")
def runs() -> dict[Ramp, tuple[Steps, Steps]]:
    """Each case as the loop runs it, and by hand."""
    cases = FP32 + BF16
    return dict(zip(cases, run_distributed(1, both, cases)[0], strict=True))


@pytest.mark.parametrize("case", FP32, ids=_id)
def test_a_run_is_that_of_steps_of_these_batches_by_hand(case: Ramp, runs: dict[Ramp, tuple[Steps, Steps]]) -> None:
    run, hand = runs[case]
    # As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little.
    assert run.losses == pytest.approx(hand.losses, rel=1e-5)
    assert run.norms == pytest.approx(hand.norms, rel=1e-5)
    assert run.multiplier_norms == pytest.approx(hand.multiplier_norms, rel=1e-5)
    # Newton-Schulz enlarges differences of small singular values (test_muon_invariance.py derives by how much).
    relative = 1e-5 if case.optimizer == "adamw" else 1e-4
    assert run.tensors.keys() == hand.tensors.keys()
    for name, tensor in hand.tensors.items():
        assert torch.linalg.vector_norm(run.tensors[name] - tensor) <= relative * torch.linalg.vector_norm(tensor), name


@pytest.mark.parametrize("case", BF16, ids=_id)
def test_in_bf16_gradients_are_means_over_the_batch_too(case: Ramp, runs: dict[Ramp, tuple[Steps, Steps]]) -> None:
    run, hand = runs[case]
    # Gradients are rounded to 2^-9 for each micro-batch here, and for a whole batch there: norms of many elements agree
    # better than that, but later ones also depend on weights that are rounded to 2^-9. A sum over two micro-batches
    # instead of a mean, or a mean over the number of the step before, is off by a quarter or more.
    assert run.losses == pytest.approx(hand.losses, rel=2**-8)
    assert run.norms == pytest.approx(hand.norms, rel=2**-5)


def schedule(full: int, start: int, increment: int, samples: int, steps: int = 100) -> Schedule:
    ramp = BatchRamp(start=start, increment=increment, samples=samples)
    return Schedule(Config(train=TrainConfig(steps=steps, global_batch_size=full, micro_batch_size=1, batch_ramp=ramp)))


RAMPS = [(64, 8, 8, 700), (64, 16, 48, 1), (512, 32, 32, 10_000), (24, 4, 4, 101), (30, 3, 9, 30)]
"""(full batch, first batch, increment, samples): shares that are integers and such that are not, and steps that pass
several shares at once."""


@pytest.mark.parametrize("ramp", RAMPS)
def test_sizes_are_those_of_megatrons_calculator(ramp: tuple[int, int, int, int]) -> None:
    full, start, increment, samples = ramp
    theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, samples)
    sizes = []
    for first, batch in itertools.islice(schedule(*ramp).batches(), 100):
        theirs.update(first, consistency_check=True)
        assert batch == theirs.get_current_global_batch_size(), first
        sizes.append(batch)
    assert sizes[0] == start and sizes[-1] == full and sizes == sorted(sizes)


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_samples_after_some_steps_are_the_sum_of_their_batches(ramp: tuple[int, int, int, int]) -> None:
    made = schedule(*ramp)
    for begin in (0, 1, 17, ramp[3] - 1, ramp[3], ramp[3] + 5):
        for steps, (first, _) in enumerate(itertools.islice(made.batches(begin), 100)):
            assert made.samples_after(begin, steps) == first, (begin, steps)


def test_warm_up_and_decay_are_in_steps_and_the_ramp_multiplies_them() -> None:
    ramp = BatchRamp(start=4, increment=12, samples=12)
    config = Config(
        optimizer=OptimizerConfig(lr=1.0, warmup_steps=2, decay_steps=2),
        train=TrainConfig(steps=6, global_batch_size=16, micro_batch_size=4, batch_ramp=ramp),
    )
    # Three batches of 4, then 16.
    expected = [0.5 * 0.5, 1.0 * 0.5, 1.0 * 0.5, 1.0, 0.5, 0.0]
    assert list(itertools.islice(Schedule(config).lr_factors(), 6)) == pytest.approx(expected, rel=1e-15)
    ramp.lr_scaling = "none"
    assert list(itertools.islice(Schedule(config).lr_factors(), 6)) == pytest.approx([0.5, 1, 1, 1, 0.5, 0.0])


def test_without_a_ramp_every_batch_is_full_and_the_factor_exact() -> None:
    made = Schedule(Config(optimizer=OptimizerConfig(warmup_steps=3)))
    assert list(itertools.islice(made.batches(5), 3)) == [(5, 32), (37, 32), (69, 32)]
    assert made.samples_after(5, 3) == 101
    assert list(itertools.islice(made.lr_factors(), 4)) == [1 / 3, 2 / 3, 1.0, 1.0]
    assert math.isclose(made.lr_factor(0, 32), 1 / 3, rel_tol=0)
