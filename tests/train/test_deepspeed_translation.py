"""DeepSpeed's keys for optimizer, schedule and clipping: what a run reads in them, prints of them, and contradicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megamult.config import Config
from megamult.optim.schedule import lr_factor
from megamult.train.command_line import parse
from megamult.train.deepspeed_config import deepspeed_config

TINY = ("--config", "examples/configs/tiny.yaml")
HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": "auto",
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The file of Hugging Face's documentation for ZeRO 2."""
SCHEDULE = {"warmup_num_steps": 10, "warmup_type": "linear", "total_num_steps": 500}


def read(file: dict[str, Any], *arguments: str) -> tuple[Config, list[str]]:
    """The configuration of a run with this DeepSpeed configuration, and the parts of the error, if there is one."""
    config, _ = parse([*arguments, f"--deepspeed={json.dumps(file)}"])
    try:
        deepspeed_config(config, 1)
    except ValueError as error:
        return config, str(error).split("; deepspeed.")
    return config, []


def test_a_file_of_hugging_faces_runs_at_the_first_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zero2.json").write_text(json.dumps(HUGGING_FACE), encoding="utf-8")
    config, _ = parse([*TINY, "--parallel.zero_stage", "2", "--deepspeed", str(tmp_path / "zero2.json")])
    without, _ = parse([*TINY, "--parallel.zero_stage", "2"])
    assert (config.optimizer, config.train) == (without.optimizer, without.train)
    given = {"overlap_comm": True, "reduce_scatter": True}
    expected = deepspeed_config(without, 1)
    assert deepspeed_config(config, 1) == expected | {"zero_optimization": expected["zero_optimization"] | given}
    assert "optimizer.lr 0.004" in capsys.readouterr().err, "the file leaves it out"


def test_numbers_become_keys_of_the_run_and_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    config, errors = read(
        {
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0}},
            "scheduler": {"type": "WarmupCosineLR", "params": SCHEDULE | {"cos_min_ratio": 0.1}},
            "gradient_clipping": 0.5,
        }
    )
    made = config.optimizer
    assert not errors and made.adamw is not None
    assert (made.name, made.lr, made.weight_decay, made.clip_grad_norm) == ("adamw", 1e-4, 0.0, 0.5)
    assert tuple(made.adamw.betas) == (0.9, 0.999) and made.adamw.eps == 1e-8
    assert (made.warmup_steps, made.decay_steps, made.decay, config.train.steps) == (10, 490, "cosine", 500)
    assert made.min_lr == pytest.approx(1e-5)
    assert config.deepspeed is None, "config.yaml says it in the run's own keys, which a later start may change"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("note: deepspeed.gradient_clipping, deepspeed.optimizer, deepspeed.scheduler: read as ")
    assert "optimizer.lr 0.0001" in said and said.endswith("; they leave out: optimizer.adamw.eps 1e-08")


def test_a_number_that_contradicts_a_key_that_the_user_gave_is_a_conflict() -> None:
    file = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR", "params": SCHEDULE},
        "gradient_clipping": 0.5,
    }
    ours = ("--optimizer.name=muon", "--optimizer.lr=3e-4", "--train.steps=100", "--optimizer.min_lr=1e-5")
    config, errors = read(file, *ours, "--optimizer.adamw.betas=[0.9, 0.95]")
    assert [each.removeprefix("deepspeed.").split(": ")[0] for each in errors] == [
        "optimizer.type is 'AdamW', which means optimizer.name adamw, and this run has muon",
        "optimizer.params.lr is 0.0001, which means optimizer.lr 0.0001, and this run has 0.0003",
        "scheduler.params.total_num_steps is 500, which means train.steps 500, and this run has 100",
        "scheduler.type is 'WarmupDecayLR', which means optimizer.min_lr 0.0, and this run has 1e-05",
    ]
    assert all("change one of them, or remove deepspeed." in each for each in errors)
    assert config.optimizer.clip_grad_norm == 0.5, "nobody else has said it"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 5}}, "warmup_type is not set, and DeepSpeed's default is"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_type": "log"}}, "is 'log': .*; use linear, or"),
        ({"type": "WarmupLR", "params": SCHEDULE}, "total_num_steps is set, and WarmupLR does not have it: remove it"),
        ({"params": {"warmup_max_lr": 1e-3}}, "scheduler.type is not set: give it, or remove scheduler"),
        ({"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}, "is 1e-06: .*begins at 0.*; use 0 or 0.0, or remove"),
    ],
    ids=["no curve", "another curve", "another type's key", "no type", "another beginning"],
)
def test_a_schedule_that_megamult_cannot_say_is_refused(section: dict[str, Any], says: str) -> None:
    _, errors = read({"scheduler": section})
    (error,) = errors
    assert re.search(says, error), error


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_the_learning_rates_are_those_of_deepspeeds_schedule(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    params: dict[str, Any] = {"warmup_num_steps": 10, "warmup_type": "linear"}
    params |= {} if kind == "WarmupLR" else {"total_num_steps": 50}
    params |= {"cos_min_ratio": 0.1} if kind == "WarmupCosineLR" else {"warmup_max_lr": 1e-3}
    ours = ("--train.steps=50",) if kind == "WarmupLR" else ()
    config, errors = read({"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"type": kind, "params": params}}, *ours)
    assert not errors and config.train.steps == 50
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    theirs = []
    for _ in range(51):
        scheduler.step()
        theirs.append(scheduler.get_lr()[0])
    if kind == "WarmupCosineLR":
        theirs.insert(10, 1e-3)  # it leaves out the peak
    found = [config.optimizer.lr * lr_factor(step, 50, config.optimizer) for step in range(50)]
    # Its first step is at 0, and the first update comes before its first step.
    assert found == pytest.approx(theirs[1:51], rel=1e-12)
