"""A run that stops and goes on is the run that did not stop: bit by bit in one layout, to rounding in another."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megamult.checkpoint.saved import SavedCheckpoint
from tests.checkpoint.resume_workers import Run, Trace, run_all, variant
from tests.invariance import Case, name_of
from tests.processes import run_distributed

HALF = 10

BITWISE = [
    Case(zero=0, optimizer="adamw"),
    Case(zero=0, optimizer="muon", implementation="folded"),
    Case(zero=1, optimizer="adamw", implementation="folded", dtype="bf16"),
    Case(zero=0, optimizer="muon", dtype="bf16"),
    Case(world=2, zero=0, optimizer="muon"),
    Case(world=2, zero=1, optimizer="muon", implementation="folded", dtype="bf16"),
    Case(world=2, zero=1, optimizer="adamw", implementation="folded", accumulation=3),
    Case(world=2, zero=2, optimizer="muon", placement="mapping"),
    Case(world=2, zero=2, optimizer="adamw", dtype="bf16", accumulation=3),
    Case(world=2, zero=3, optimizer="muon", implementation="folded", sub_group_size=10_000),
    Case(world=2, zero=3, optimizer="adamw", dtype="bf16"),
    Case(world=2, tensor=2, sequence=True, zero=1, optimizer="adamw", placement="scalar", tied=True),
    Case(world=2, zero=2, optimizer="normuon"),
    Case(world=2, zero=2, optimizer="muon", knobs="all"),
    Case(world=2, tensor=2, zero=1, optimizer="adamw", implementation="folded", knobs="all"),
    Case(world=2, zero=1, optimizer="muon", implementation="folded", knobs="fixed"),
    Case(world=2, tensor=2, zero=3, optimizer="adamw", knobs="fixed"),
    Case(world=2, zero=2, optimizer="muon", knobs="long ramp", accumulation=2),
    Case(world=2, tensor=2, zero=1, optimizer="adamw", implementation="folded", dtype="bf16", knobs="long ramp"),
    Case(world=2, zero=3, optimizer="adamw", dtype="bf16", knobs="decoder"),
    Case(world=2, tensor=2, zero=1, optimizer="muon", implementation="folded", knobs="decoder"),
    Case(world=2, zero=2, optimizer="muon", knobs="qk_clip"),
    Case(world=2, tensor=2, zero=3, optimizer="adamw", implementation="folded", dtype="bf16", knobs="qk_clip"),
    Case(world=2, tensor=2, zero=1, optimizer="muon", implementation="folded", dtype="bf16", model="falcon_h1"),
    Case(world=2, zero=3, optimizer="muon", dtype="bf16", model="hybrid"),
]
"""All optimizers, both implementations, fp32 and bf16, every ZeRO class, and a batch that grows before and after."""


def _id(case: Case) -> str:
    return f"{name_of(case)}-{case.optimizer}-{case.dtype}-{case.model}"


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
            rest.warm = i % 2 == 1
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
        timed = {"seconds", "tokens_per_second", "time"}
        expected = [{k: v for k, v in record.items() if k not in timed} for record in whole.records[HALF:]]
        assert [{k: v for k, v in record.items() if k not in timed} for record in rest.records] == expected
        assert case.knobs != "qk_clip" or any(record["qk_clip_heads"] for record in rest.records)
        assert rest.drawn == whole.drawn and len(rest.drawn) == 3, "random numbers go on, every rank's own"
        assert rest.state.keys() == whole.state.keys()
        for key, value in whole.state.items():
            assert torch.equal(rest.state[key], value), key


BASE = Case(world=4, tensor=2, zero=2)
OTHERS = [
    Case(zero=3, implementation="folded"),
    Case(world=2, tensor=2, sequence=True, zero=1),
    Case(world=4, tensor=4, zero=1, implementation="folded"),
    Case(world=4, zero=0, accumulation=3),
]
OPTIMIZERS = ("adamw", "muon", "normuon")
RAMP, RAMP_OTHER = Case(world=4, tensor=2, zero=2, knobs="ramp"), Case(zero=3, implementation="folded", knobs="ramp")
HYBRID, HYBRID_OTHER = (
    Case(world=4, tensor=4, zero=2, model="hybrid"),
    Case(zero=3, implementation="folded", model="hybrid"),
)
RAMP_SAVED, RAMP_BATCHES = 3, [4, 4, 8, 12, 16]
SAVED, MORE = 5, 5
RELATIVE = 1e-5
"""As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little."""


def other_runs(folder: Path, step: str) -> dict[tuple[str, str, Case], Run]:
    """One process from BASE's checkpoints with what else may change; and a plain model to give multipliers to."""
    one, none, load = Case(zero=1), folder / "none", folder / "adamw" / step
    plain = Case(zero=1, implementation="none")
    return {
        ("adamw", "reset", one): Run(one, MORE, none, load=load, reset_optimizer=True),
        ("muon", "other optimizer", one): Run(
            variant(one, optimizer="muon"), MORE, none, load=load, reset_optimizer=True
        ),
        ("adamw", "bf16", one): Run(variant(one, dtype="bf16"), MORE, none, load=load),
        ("adamw", "plain", plain): Run(plain, SAVED + 1, folder / "plain", save_at=(SAVED,)),
        ("adamw", "plain gets layer", one): Run(one, 1, none, load=folder / "plain" / step),
        ("adamw", "plain gets folded", one): Run(
            variant(one, implementation="folded"), 1, none, load=folder / "plain" / step
        ),
        ("adamw", "plain gets layer, initial values given", one): Run(
            variant(one, knobs="initial"), 1, none, load=folder / "plain" / step
        ),
        ("adamw", "plain gets folded, initial values given", one): Run(
            variant(one, implementation="folded", knobs="initial"), 1, none, load=folder / "plain" / step
        ),
    }


@pytest.fixture(scope="module")
def shardings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, Case], Trace]:
    """(optimizer, which, case) -> rank 0's trace. `whole`: BASE without a stop; `there`: another layout from BASE's
    checkpoint; `back`: BASE from what that layout saved at once."""
    folder = tmp_path_factory.mktemp("shardings")
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
    ramp = folder / "ramp"
    rest = Run(RAMP_OTHER, 2, folder / "none", load=ramp / f"checkpoints/step_{RAMP_SAVED}", weights_seed=99)
    hybrid = Run(HYBRID, SAVED + 2, folder / "hybrid", save_at=(SAVED,))
    hybrid_rest = Run(HYBRID_OTHER, 2, folder / "none", load=folder / "hybrid" / step, weights_seed=99)
    more = {("adamw", "ramp", RAMP): Run(RAMP, 5, ramp, save_at=(RAMP_SAVED,)), ("adamw", "whole", HYBRID): hybrid}
    launch(4, whole | there(4) | more)
    more = {("adamw", "ramp", RAMP_OTHER): rest, ("adamw", "there", HYBRID_OTHER): hybrid_rest}
    launch(1, there(1) | other_runs(folder, step) | more)
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
    optimizer: str, case: Case, which: str, shardings: dict[tuple[str, str, Case], Trace]
) -> None:
    whole, other = shardings[optimizer, "whole", BASE], shardings[optimizer, which, case]
    batch = BASE.config().train.global_batch_size
    assert other.seen == list(range(SAVED * batch, (SAVED + MORE) * batch))
    assert other.seen == whole.seen[SAVED * batch :]
    for key in ("step", "tokens", "lr", "loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in whole.records[SAVED:]]
        assert [record[key] for record in other.records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_mixers_go_on_in_another_layout(shardings: dict[tuple[str, str, Case], Trace]) -> None:
    """Two groups over four ranks have copies of B and C, and are whole in one process."""
    whole, other = shardings["adamw", "whole", HYBRID], shardings["adamw", "there", HYBRID_OTHER]
    for key in ("step", "loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in whole.records[SAVED:]]
        assert [record[key] for record in other.records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_another_layout_goes_on_in_the_middle_of_a_ramp(shardings: dict[tuple[str, str, Case], Trace]) -> None:
    whole, other = shardings["adamw", "ramp", RAMP], shardings["adamw", "ramp", RAMP_OTHER]
    assert [record["batch_size"] for record in whole.records] == RAMP_BATCHES
    assert [record["batch_size"] for record in other.records] == RAMP_BATCHES[RAMP_SAVED:]
    assert whole.seen == list(range(sum(RAMP_BATCHES)))
    assert other.seen == list(range(sum(RAMP_BATCHES[:RAMP_SAVED]), sum(RAMP_BATCHES)))
    assert [record["tokens"] for record in whole.records] == [
        total * BASE.config().model.seq_length for total in itertools.accumulate(RAMP_BATCHES)
    ]
    for record in whole.records:
        tokens = record["tokens_per_second"] * record["seconds"]
        assert tokens == pytest.approx(record["batch_size"] * BASE.config().model.seq_length, rel=1e-9)
    for key in ("step", "tokens", "lr", "loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in whole.records[RAMP_SAVED:]]
        assert [record[key] for record in other.records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


def test_a_checkpoint_of_any_layout_has_the_same_tensors(
    shardings: dict[tuple[str, str, Case], Trace], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(path for path in tmp_path_factory.getbasetemp().iterdir() if path.name.startswith("shardings"))
    for optimizer in OPTIMIZERS:
        base = SavedCheckpoint(folder / optimizer / f"checkpoints/step_{SAVED}")
        base.verify()
        for i in range(len(OTHERS)):
            other = SavedCheckpoint(folder / f"{optimizer}_{i}/checkpoints/step_{SAVED}")
            model = {name for name in base.shapes if not name.startswith("rng.")}
            assert {name for name in other.shapes if not name.startswith("rng.")} == model
            for name in model:
                assert torch.equal(other.read(name), base.read(name)), name


def _losses(trace: Trace) -> list[float]:
    return [record["loss"] for record in trace.records]


def test_a_fresh_optimizer_goes_on_with_the_model_and_the_data_alone(
    shardings: dict[tuple[str, str, Case], Trace],
) -> None:
    """The first loss depends on the weights alone; the others show that lost state would be seen above."""
    whole = _losses(shardings["adamw", "whole", BASE])[SAVED:]
    for optimizer, which in (("adamw", "reset"), ("muon", "other optimizer")):
        fresh = shardings[optimizer, which, Case(zero=1)]
        assert _losses(fresh)[0] == pytest.approx(whole[0], rel=RELATIVE)
        assert abs(_losses(fresh)[-1] - whole[-1]) > 100 * RELATIVE * whole[-1]
        assert [record["step"] for record in fresh.records] == list(range(SAVED + 1, SAVED + MORE + 1))


def test_another_dtype_goes_on_to_its_rounding(shardings: dict[tuple[str, str, Case], Trace]) -> None:
    # As test_muon_invariance.py allows for bf16: 2^-8 of the loss.
    whole = _losses(shardings["adamw", "whole", BASE])[SAVED:]
    assert _losses(shardings["adamw", "bf16", Case(zero=1)]) == pytest.approx(whole, rel=2**-8)


def test_a_plain_model_gets_multipliers_that_start_at_1(shardings: dict[tuple[str, str, Case], Trace]) -> None:
    plain = shardings["adamw", "plain", Case(zero=1, implementation="none")]
    for which in itertools.product(("plain gets layer", "plain gets folded"), ("", ", initial values given")):
        other = shardings["adamw", "".join(which), Case(zero=1)]
        assert _losses(other) == pytest.approx(_losses(plain)[SAVED:], rel=RELATIVE), "the same function"
        assert len(other.new) == 2 * (2 * 7 + 1), "two sides of seven matrices in two layers, and of the embedding"
