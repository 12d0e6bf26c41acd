"""The training loop drives any engine that keeps the protocol: here one in this process, without DeepSpeed."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.checkpoint.saved import SavedCheckpoint
from megamult.train import checkpoints, engine, loop, records
from tests.processes import run_distributed
from tests.small import Samples
from tests.train.plain_engine import (
    BATCHES,
    LR,
    MICRO,
    SEQ,
    STEPS,
    VALID,
    drive,
    loss_of,
    samples,
    tiny_model,
    valid_samples,
)

FACTORS = (0.5 / 3**0.5, 1 / 3**0.5, (2 / 3) ** 0.5, 1.0)
"""Of the learning rate: two steps of warm-up, times sqrt(batch / full batch)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def driven(folder: Path) -> dict[str, Any]:
    return run_distributed(1, drive, folder)[0]


def by_hand() -> tuple[list[tuple[float, float]], list[float], dict[str, Tensor]]:
    """(loss, gradient norm) of every step, losses of the evaluations, and the weights at the end."""

    def batch(source: Samples, first: int, size: int) -> tuple[Tensor, Tensor]:
        rows = [source[i] for i in range(first, first + size)]
        return torch.stack([row["tokens"] for row in rows]), torch.stack([row["labels"] for row in rows])

    model, steps, evaluations = tiny_model(), [], []
    for step, factor in enumerate(FACTORS):
        loss = loss_of(model, *batch(samples(), sum(BATCHES[:step]), BATCHES[step]))
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        steps.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).norm().item()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * factor * parameter.grad
            if step % 2:
                evaluations.append(loss_of(model, *batch(valid_samples(), 0, VALID)).item())
    return steps, evaluations, {name: parameter.detach() for name, parameter in model.named_parameters()}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_losses_are_those_of_a_loop_by_hand(folder: Path, driven: dict[str, Any]) -> None:
    steps, evaluations, weights = by_hand()
    assert driven["whole"]["reason"] is None
    written = [r for r in metrics(folder / "whole") if "loss" in r]
    # fp32: a batch is the mean of its micro-batches here, and one mean there.
    assert [(r["loss"], r["grad_norm"]) for r in written] == [pytest.approx(each, rel=1e-6) for each in steps]
    assert [r["multiplier_grad_norm"] for r in written] == [0.25] * STEPS
    assert [r["lr"] for r in written] == pytest.approx([LR * factor for factor in FACTORS], rel=1e-15)
    assert [r["batch_size"] for r in written] == list(BATCHES)
    assert [r["skipped_steps"] for r in written] == [0, 1, 1, 1]
    assert [r["lr/embedding"] for r in written] == [r["lr"] for r in written]
    assert [r["tokens"] for r in written] == [sum(BATCHES[: i + 1]) * SEQ for i in range(STEPS)]
    assert [r["tokens_per_second"] * r["seconds"] for r in written] == pytest.approx([b * SEQ for b in BATCHES])
    found = [(r["step"], r["valid_loss"]) for r in metrics(folder / "whole") if "valid_loss" in r]
    assert found == [(2, pytest.approx(evaluations[0], rel=1e-6)), (4, pytest.approx(evaluations[1], rel=1e-6))]
    for name, value in weights.items():
        torch.testing.assert_close(driven["whole"]["weights"][name], value, rtol=1e-6, atol=1e-7)


def test_each_micro_batch_is_read_when_the_engine_takes_it(driven: dict[str, Any]) -> None:
    events = driven["whole"]["events"]
    step = ["3: samples"]
    for micro in (1, 2):
        step += [f"3: reading micro-batch {micro} of 2", f"3: micro-batch {micro} of 2", "compute"]
    at = events.index("3: samples")
    assert events[at : at + len(step)] == step
    look = ["2: samples of the evaluation"]
    for number in range(1, VALID // MICRO + 1):
        which = f"evaluation's micro-batch {number} of 6"
        look += [f"2: reading the {which}", f"2: {which}", "evaluate"]
    at = events.index("2: samples of the evaluation")
    assert events[at : at + len(look)] == look


def test_a_checkpoint_holds_the_engines_state_and_goes_back_into_it(folder: Path, driven: dict[str, Any]) -> None:
    assert driven["optimizer"] == {"name": "adamw", "updates": 3, "skipped_steps": 1}
    last = SavedCheckpoint(folder / f"whole/checkpoints/step_{STEPS}")
    for name, value in driven["whole"]["weights"].items():
        assert torch.equal(last.read(f"model.{name}"), value)
        assert torch.equal(driven["rest"]["weights"][name], value), "the last step again"
    assert not torch.equal(last.read("model.0.weight"), tiny_model()[0].weight)
    assert metrics(folder / "rest")[0]["step"] == STEPS


def test_multipliers_come_by_role_and_side(driven: dict[str, Any]) -> None:
    found = driven["whole"]["multipliers"]
    assert found.keys() == {"embedding/row"}
    assert torch.equal(found["embedding/row"], driven["whole"]["weights"]["0.weight"].sum(1))


@pytest.mark.parametrize("module", [loop, records, checkpoints, engine], ids=lambda module: module.__name__)
def test_the_loop_knows_neither_deepspeed_nor_a_model(module: Any) -> None:
    source = inspect.getsource(module)
    assert not [word for word in ("deepspeed", "DeepSpeed", "GPT", "llama", "ZeRO") if word in source]
