"""What a resumed run says of the keys that it changes, and which configuration each start leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from megamult.config import Config
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.train.changes import changes
from megamult.train.config import TrainConfig
from tests.train.command import data_arguments, start


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


def test_an_override_that_is_left_out_at_resume_is_said_and_its_configuration_kept(
    corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus)),
        *("--model.seq_length", "32", "--optimizer.warmup_steps", "0", "--train.run_dir", str(run_dir)),
    ]
    first = start([*arguments, "--train.steps", "2", "--optimizer.lr", "1e-3"])
    assert first.code == 0 and "configuration changed" not in first.text, first.text
    second = start([*arguments, "--train.steps", "4", "--checkpoint.load", "latest"])
    assert second.code == 0, second.text
    lines = second.stdout.splitlines()
    at = lines.index("configuration changed since the checkpoint (old -> new):")
    assert lines[at - 1].startswith("going on from ")
    assert lines[at + 1 : at + 3] == ["  optimizer.lr  0.001 -> 0.004", "  train.steps   2 -> 4"]
    assert not lines[at + 3].startswith("  ")
    rates = {
        name: yaml.safe_load((run_dir / name).read_text())["optimizer"]["lr"]
        for name in ("config_step_0.yaml", "config_step_2.yaml", "config.yaml")
    }
    assert rates == {"config_step_0.yaml": 1e-3, "config_step_2.yaml": 4e-3, "config.yaml": 4e-3}
