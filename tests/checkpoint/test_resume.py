"""A run that stops and goes on is the run that did not stop: bit by bit in one layout, to rounding in another."""

from __future__ import annotations

import pytest
import torch

from megamult.checkpoint.saved import SavedCheckpoint
from tests.checkpoint.resume_workers import Run, Trace, run_all, variant
from tests.distributed import run_distributed
from tests.invariance import Case, name_of

HALF = 10

BITWISE = [
    Case(zero=0, optimizer="adamw"),
    Case(zero=0, optimizer="muon", implementation="folded"),
    Case(zero=1, optimizer="adamw", implementation="folded", dtype="bf16"),
    Case(zero=0, optimizer="muon", dtype="bf16"),
    Case(world=2, zero=0, optimizer="muon"),
    Case(world=2, zero=1, optimizer="muon", implementation="folded", dtype="bf16"),
    Case(world=2, zero=1, optimizer="adamw", implementation="folded", accumulation=4),
    Case(world=2, zero=2, optimizer="muon", placement="mapping"),
    Case(world=2, zero=2, optimizer="adamw", dtype="bf16", accumulation=4),
    Case(world=2, zero=3, optimizer="muon", implementation="folded", sub_group_size=10_000),
    Case(world=2, zero=3, optimizer="adamw", dtype="bf16"),
    Case(world=2, tensor=2, sequence=True, zero=1, optimizer="adamw", placement="scalar", tied=True),
]
"""Both optimizers, both implementations, fp32 and bf16, every ZeRO class."""


def _id(case: Case) -> str:
    return f"{name_of(case)}-{case.optimizer}-{case.dtype}"


@pytest.fixture(scope="module")
def bitwise(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[list[Trace], list[Trace]]]:
    """Of each case, by rank: 20 steps without a stop, and the last 10 of them from the checkpoint."""
    folder = tmp_path_factory.mktemp("bitwise")
    found: dict[Case, tuple[list[Trace], list[Trace]]] = {}
    for world in sorted({case.world for case in BITWISE}):
        cases = [case for case in BITWISE if case.world == world]
        runs = []
        for i, case in enumerate(cases):
            run_dir = folder / f"{world}_{i}"
            # The save is written while the run goes on: what is written must be step 10's all the same.
            whole = Run(case, 2 * HALF, run_dir, save_at=(HALF,), asynchronous=i % 3 != 2)
            rest = Run(case, HALF, folder / "none", load=run_dir / f"checkpoints/step_{HALF}", weights_seed=99)
            runs += [whole, rest]
        by_rank = run_distributed(world, run_all, runs, timeout=900)
        for i, case in enumerate(cases):
            found[case] = ([traces[2 * i] for traces in by_rank], [traces[2 * i + 1] for traces in by_rank])
    return found


@pytest.mark.parametrize("case", BITWISE, ids=_id)
def test_ten_steps_and_ten_more_are_twenty_bit_by_bit(
    case: Case, bitwise: dict[Case, tuple[list[Trace], list[Trace]]]
) -> None:
    for whole, rest in zip(*bitwise[case], strict=True):
        timed = {"seconds", "tokens_per_second"}
        expected = [{k: v for k, v in record.items() if k not in timed} for record in whole.records[HALF:]]
        assert [{k: v for k, v in record.items() if k not in timed} for record in rest.records] == expected
        assert rest.state.keys() == whole.state.keys()
        for key, value in whole.state.items():
            assert torch.equal(rest.state[key], value), key


BASE = Case(world=4, tensor=2, zero=2)
OTHERS = [
    Case(zero=3, implementation="folded"),
    Case(world=2, tensor=2, sequence=True, zero=1),
    Case(world=4, tensor=4, zero=1, implementation="folded"),
    Case(world=4, zero=0, accumulation=4),
]
OPTIMIZERS = ("adamw", "muon")
SAVED, MORE = 5, 5
RELATIVE = 1e-5
"""As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, Case], Trace]:
    """(optimizer, which, case) -> rank 0's trace. `whole`: BASE without a stop; `there`: another layout from BASE's
    checkpoint; `back`: BASE from what that layout saved at once."""
    folder = tmp_path_factory.mktemp("layouts")
    found: dict[tuple[str, str, Case], Trace] = {}
    step = f"checkpoints/step_{SAVED}"

    def launch(world: int, runs: dict[tuple[str, str, Case], Run]) -> None:
        if runs:
            traces = run_distributed(world, run_all, list(runs.values()), timeout=900)[0]
            found.update(zip(runs, traces, strict=True))

    def there(world: int) -> dict[tuple[str, str, Case], Run]:
        return {
            (optimizer, "there", case): Run(
                variant(case, optimizer=optimizer),
                MORE,
                folder / f"{optimizer}_{i}",
                load=folder / optimizer / step,
                save_at=(SAVED,),
                weights_seed=99,
            )
            for i, case in enumerate(OTHERS)
            for optimizer in OPTIMIZERS
            if case.world == world
        }

    whole = {
        (o, "whole", BASE): Run(variant(BASE, optimizer=o), SAVED + MORE, folder / o, save_at=(SAVED,))
        for o in OPTIMIZERS
    }
    launch(4, whole | there(4))
    launch(1, there(1))
    launch(2, there(2))
    back = {
        (o, "back", case): Run(
            variant(BASE, optimizer=o), MORE, folder / "none", load=folder / f"{o}_{i}" / step, weights_seed=98
        )
        for i, case in enumerate(OTHERS)
        for o in OPTIMIZERS
    }
    launch(4, back)
    return found


@pytest.mark.parametrize("which", ["there", "back"])
@pytest.mark.parametrize("case", OTHERS, ids=name_of)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_another_layout_goes_on_with_the_same_samples_and_losses(
    optimizer: str, case: Case, which: str, layouts: dict[tuple[str, str, Case], Trace]
) -> None:
    whole, other = layouts[optimizer, "whole", BASE], layouts[optimizer, which, case]
    batch = BASE.config().train.global_batch_size
    assert other.seen == list(range(SAVED * batch, (SAVED + MORE) * batch))
    assert other.seen == whole.seen[SAVED * batch :]
    for key in ("step", "tokens", "lr", "loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in whole.records[SAVED:]]
        assert [record[key] for record in other.records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_a_fresh_optimizer_would_be_seen(layouts: dict[tuple[str, str, Case], Trace]) -> None:
    """The comparison must see lost state: without it the losses would be others by far more than the tolerance."""
    for optimizer in OPTIMIZERS:
        losses = [record["loss"] for record in layouts[optimizer, "whole", BASE].records]
        assert abs(losses[-1] - losses[SAVED]) > 1000 * RELATIVE * losses[SAVED]


def test_a_checkpoint_of_any_layout_has_the_same_tensors(
    layouts: dict[tuple[str, str, Case], Trace], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(path for path in tmp_path_factory.getbasetemp().iterdir() if path.name.startswith("layouts"))
    for optimizer in OPTIMIZERS:
        base = SavedCheckpoint(folder / optimizer / f"checkpoints/step_{SAVED}")
        base.verify()
        for i in range(len(OTHERS)):
            other = SavedCheckpoint(folder / f"{optimizer}_{i}/checkpoints/step_{SAVED}")
            model = {name for name in base.shapes if not name.startswith("rng.")}
            assert {name for name in other.shapes if not name.startswith("rng.")} == model
            for name in model:
                assert torch.equal(other.read(name), base.read(name)), name
