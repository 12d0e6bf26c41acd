"""Named validation sets, samples left out and a mask of documents, all in one run from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamult.checkpoint.info import CheckpointInfo
from tests.processes import run_distributed
from tests.train.command import REPOSITORY, answers, data_arguments


def arguments(prefix: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    sets = f"{{whole: {prefix}_valid, both: {{{prefix}_valid: 1, {prefix}_train: 3}}}}"
    return [
        *("--config", str(REPOSITORY / "examples/configs/tiny.yaml"), *data_arguments(prefix)),
        *(f"--data.valid={sets}", "--train.eval_batches", "null", "--data.document_mask", "true"),
        *("--model.seq_length", "32", "--model.num_layers", "1", "--optimizer.warmup_steps", "0"),
        *("--train.steps", str(steps), "--train.run_dir", str(run_dir), *more),
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_with_all_of_them_and_its_restart(corpus: Path, tmp_path: Path) -> None:
    run_dir, skip = tmp_path / "run", "--data.skip=[[16, 40]]"
    load = ("--checkpoint.load", "latest")
    cases = [
        arguments(corpus, run_dir, 2, skip),
        arguments(corpus, run_dir, 3, *load),
        arguments(corpus, run_dir, 3, "--data.skip=[[16, 40], [50, 60]]", *load),
        arguments(corpus, run_dir, 3, skip, *load),
    ]
    first, lacks, trained, last = run_distributed(1, answers, cases)[0]
    assert first[0] is None, first
    assert lacks[0] == 2 and "data.skip lacks the samples 16 to 40, which the run has left out" in lacks[1]
    assert trained[0] == 2 and "data.skip has the samples 50 to 56, on which the run has trained" in trained[1]
    assert "set them back, or load another checkpoint" in lacks[1] and lacks[1].count("error:") == 1
    assert last[0] is None, last
    lines = [r for r in metrics(run_dir) if "valid_loss" in r]
    assert [r["step"] for r in lines] == [2, 3]
    for line in lines:
        assert line.keys() == {"step", "time", "valid_loss", "valid/whole/loss", "valid/both/loss"}
        assert line["valid_loss"] == pytest.approx((line["valid/whole/loss"] + line["valid/both/loss"]) / 2, rel=1e-12)
    tags = EventAccumulator(str(run_dir / "tensorboard")).Reload().Tags()["scalars"]
    assert {"valid/loss", "valid/whole/loss", "valid/both/loss"} <= set(tags)
    steps = [r for r in metrics(run_dir) if "loss" in r]
    assert [r["tokens"] for r in steps] == [16 * 32, 32 * 32, 48 * 32], "only what is trained on"
    info = CheckpointInfo.from_json((run_dir / "checkpoints/step_3/checkpoint.json").read_text(encoding="utf-8"))
    assert info.samples == 48 and info.data is not None and info.data["skip"] == [[16, 40]]
