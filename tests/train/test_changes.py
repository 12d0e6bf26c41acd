"""What a resumed run says of the keys that it changes, and which configuration each start leaves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamult.config import Config
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.train.changes import changes
from megamult.train.config import TrainConfig
from tests.train.command import Outcome, data_arguments, start


def saved(config: Config) -> dict[str, Any]:
    """The configuration as a checkpoint's JSON has it."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def test_every_changed_key_is_a_line_also_deepspeeds_and_where_the_run_goes_on_from_is_none() -> None:
    before = Config(
        optimizer=OptimizerConfig(lr=1e-3, adamw=AdamWConfig(betas=(0.9, 0.99))),
        train=TrainConfig(run_dir="runs/a"),
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}},
    )
    now = dataclasses.replace(
        before,
        optimizer=OptimizerConfig(lr=4e-3, adamw=AdamWConfig(betas=(0.9, 0.99))),
        checkpoint=dataclasses.replace(before.checkpoint, load="latest"),
        deepspeed={"zero_optimization": {"reduce_bucket_size": 2000}},
    )
    assert changes(saved(before), now) == (
        "configuration changed since the checkpoint (old -> new):\n"
        "  optimizer.lr                                    0.001 -> 0.004\n"
        "  deepspeed.zero_optimization.reduce_bucket_size  1000 -> 2000\n"
        "  deepspeed.zero_optimization.overlap_comm        true -> not set"
    )
    assert changes(saved(before), before) is None


def test_a_key_that_an_older_checkpoint_lacks_counts_as_its_default() -> None:
    before = saved(Config())
    del before["optimizer"]["skip_grad_norm"]
    assert changes(before, Config()) is None
    told = changes(before, Config(optimizer=OptimizerConfig(skip_grad_norm=2.0)))
    assert told is not None and told.splitlines()[1:] == ["  optimizer.skip_grad_norm  0.0 -> 2.0"]
    before["optimizer"]["gone"] = 3
    told = changes(before, Config())
    assert told is not None and told.splitlines()[1:] == ["  optimizer.gone  3 -> not set"]


@pytest.fixture(scope="module")
def resumed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome, Path]:
    """Two starts of a run, the second with other rates and without an override of the first; DeepSpeed measures too."""
    folder = tmp_path_factory.mktemp("resumed")
    deepspeed = {
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"},
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(folder / "flops.txt")},
    }
    arguments = [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus), f"--deepspeed={json.dumps(deepspeed)}"),
        *("--model.seq_length", "32", "--optimizer.warmup_steps", "0", "--train.run_dir", str(folder / "run")),
    ]
    rates = ["--optimizer.lr", "1e-3", "--optimizer.decay_steps", "1", "--multipliers.lr", "1e-3"]
    first = start([*arguments, *rates, "--train.steps", "2", "--optimizer.weight_decay", "0.05"])
    rates = ["--optimizer.lr", "5e-4", "--optimizer.decay_steps", "3", "--multipliers.lr", "2e-3"]
    curve = ["--optimizer.decay", "cosine", "--optimizer.lr_factors", "{q: 0.5}"]
    second = start([*arguments, *rates, *curve, "--train.steps", "5", "--checkpoint.load", "latest"])
    assert first.code == 0 and second.code == 0, first.text + second.text
    return first, second, folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of steps."""
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_changed_keys_and_an_override_that_is_left_out_at_resume_are_said(
    resumed: tuple[Outcome, Outcome, Path],
) -> None:
    first, second, folder = resumed
    assert "configuration changed" not in first.text
    lines = second.stdout.splitlines()
    at = lines.index("configuration changed since the checkpoint (old -> new):")
    assert lines[at - 1].startswith("going on from ")
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 8]] == [
        "multipliers.lr 0.001 -> 0.002",
        "optimizer.lr 0.001 -> 0.0005",
        "optimizer.weight_decay 0.05 -> 0.1",
        "optimizer.lr_factors.q not set -> 0.5",
        "optimizer.decay_steps 1 -> 3",
        'optimizer.decay "linear" -> "cosine"',
        "train.steps 2 -> 5",
    ]
    assert not lines[at + 8].startswith("  ")
    rates = {
        name: yaml.safe_load((folder / "run" / name).read_text())["optimizer"]["lr"]
        for name in ("config_step_0.yaml", "config_step_2.yaml", "config.yaml")
    }
    assert rates == {"config_step_0.yaml": 1e-3, "config_step_2.yaml": 5e-4, "config.yaml": 5e-4}


def test_every_group_follows_the_new_configuration_from_its_first_step(resumed: tuple[Outcome, Outcome, Path]) -> None:
    peaks = dict.fromkeys(("matrix", "undecayed", "embedding", "head"), 1.0)
    # lr, that of multipliers, and the schedule's factor at each step.
    before, after = (1e-3, 1e-3, {}), (5e-4, 2e-3, {"q": 0.5})
    cosine = [0.5 * (1 + math.cos(math.pi * x / 3)) for x in (1, 2, 3)]
    steps = [(*before, 1.0), (*before, 0.0), *((*after, factor) for factor in cosine)]
    assert len(metrics(resumed[2])) == len(steps)
    for record, (lr, of_multipliers, factors, schedule) in zip(metrics(resumed[2]), steps, strict=True):
        found = {key.removeprefix("lr/"): value for key, value in record.items() if key.startswith("lr/")}
        expected = {group: lr * factor for group, factor in (peaks | factors).items()} | {"multiplier": of_multipliers}
        assert found == pytest.approx({group: rate * schedule for group, rate in expected.items()}, rel=1e-12)
        assert record["lr"] == pytest.approx(lr * schedule, rel=1e-12)


def test_deepspeeds_monitors_and_measurements_show_the_run(resumed: tuple[Outcome, Outcome, Path]) -> None:
    *starts, folder = resumed

    def rows(name: str) -> list[list[float]]:
        with (folder / "csv" / f"{name}.csv").open(encoding="utf-8") as file:
            return [[float(value) for value in row] for row in csv.reader(file) if row[0] != "step"]

    records = metrics(folder)  # of 16 sequences each
    assert rows("train_loss") == [[16 * record["step"], record["loss"]] for record in records]
    assert rows("lr_multiplier") == [[16 * record["step"], record["lr/multiplier"]] for record in records]
    assert len(rows("valid_loss")) == 2
    # DeepSpeed's own figures are over the same sequences, also after the resume.
    assert [row[0] for row in rows("Train_Samples_lr")] == [16.0, 32.0, 48.0, 64.0, 80.0]
    for outcome, steps in zip(starts, (2, 3), strict=True):
        assert outcome.text.count("| bwd_inner: ") == steps, "wall_clock_breakdown"
        assert len(re.findall(r"\[Rank 0\] step=\d+, skipped=0, lr=", outcome.text)) == steps, "steps_per_print"
    assert "Profile Summary at step 2" in (folder / "flops.txt").read_text(encoding="utf-8")
