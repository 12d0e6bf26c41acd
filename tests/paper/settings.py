"""A setting of a few steps for the tests, and runs that are made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.paper.arms import model_of
from examples.paper.grid import Arm, Grid, make_run, nested
from examples.paper.setting import Setting
from examples.running.attempts import record_attempt
from megamult.checkpoint import saved
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.models.architectures import architecture_of
from megamult.models.common.config import DecoderConfig

ROOT = Path(__file__).parents[2]
VOCAB = 50
"""Number of tokens of the checkpoints that are made by hand."""


def tiny(corpus: str = "data/none") -> Setting:
    """`tiny.yaml` for six steps, with the learning rates and the keys of the real settings."""
    keys = {
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 96,
        "model.seq_length": 32,
        "train.steps": 6,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.eval_batches": 2,
        "train.log_histograms_every": 0,
        "optimizer.warmup_steps": 1,
        "optimizer.decay_steps": 2,
        "optimizer.decay": "exponential",
        "checkpoint.save_every": 2,
        "checkpoint.keep": 1,
        "checkpoint.keep_every": 2,
    }
    rates = {"adamw": (4e-3, 0.8), "muon": (8e-3, 0.4)}
    return Setting("tiny", ROOT / "examples" / "configs" / "tiny.yaml", keys, rates, corpus=corpus)


def losses_of(
    grid: Grid,
    setting: Setting,
    arm: Arm,
    seed: int,
    train: list[float],
    valid: float,
    figures: Mapping[int, Mapping[str, float]] = {},
) -> Path:
    """Write a complete run with these losses and, by step, these other figures, and return its directory."""
    directory = grid.directory(make_run(setting, arm, seed))
    directory.mkdir(parents=True)
    records: list[dict[str, float]] = [{"step": step, "loss": loss} for step, loss in enumerate(train, 1)]
    records.append({"step": len(train), "valid_loss": valid})
    records += [{"step": step, **values} for step, values in figures.items()]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    record_attempt(directory, 60.0, 0)
    return directory


def sizes(arm: Arm) -> DecoderConfig:
    """Sizes of the model of an arm's runs."""
    return model_of(tiny(), arm.overrides)


def write_run(grid: Grid, arm: Arm, seed: int, steps: list[int], value: Any) -> None:
    """Write a complete run's checkpoints; `value(weight, step)` is {side, or "" for W: tensor}."""
    run = make_run(tiny(), arm, seed)
    config = nested(run.configuration)
    for step in steps:
        tensors: dict[str, Tensor] = {}
        for weight in architecture_of(sizes(arm)).weights(sizes(arm), VOCAB):
            for side, values in value(weight, step).items():
                name = weight.multiplier(side)[0] if side else weight.logical
                tensors[f"model.{name}"] = values
        path = grid.directory(run) / "checkpoints" / f"step_{step}"
        path.parent.mkdir(parents=True, exist_ok=True)
        info = CheckpointInfo(step, 16, config, VOCAB)
        saved.write(path, [Chunk.whole(name, values) for name, values in tensors.items()], info, {})
    record_attempt(grid.directory(run), 1.0, 0)
