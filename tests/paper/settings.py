"""A setting of a few steps for the tests, and runs that are made by hand."""

from __future__ import annotations

import json
from pathlib import Path

from examples.paper.grid import Arm, Grid, make_run
from examples.paper.setting import Setting
from examples.running.attempts import record_attempt

ROOT = Path(__file__).parents[2]


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


def losses_of(grid: Grid, setting: Setting, arm: Arm, seed: int, train: list[float], valid: float) -> Path:
    """Write a complete run with these losses, and return its directory."""
    directory = grid.directory(make_run(setting, arm, seed))
    directory.mkdir(parents=True)
    records: list[dict[str, float]] = [{"step": step, "loss": loss} for step, loss in enumerate(train, 1)]
    records.append({"step": len(train), "valid_loss": valid})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    record_attempt(directory, 60.0, 0)
    return directory
