"""What one process computes of a run's checkpoint, for comparison with what the run itself has recorded."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.paper.gradient_probe import load
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.distributed import start
from megamult.train import corpora
from megamult.train.command_line import parse
from megamult.train.model import build_model


@torch.no_grad()
def valid_loss(checkpoint: Path) -> float:
    """The cross entropy over the run's valid batches, of a model that :func:`load` has filled."""
    run_dir = checkpoint.parents[1]
    config, _ = parse(["--config", str(run_dir / "config.yaml")])
    mesh = start.initialize(tensor=1)
    tokenizer, vocab_size = corpora.vocabulary(config)
    model = build_model(config, vocab_size, seed=None)
    load(model, SavedCheckpoint(checkpoint))
    train, sets = corpora.open_datasets(config, tokenizer, run_dir, mesh)
    valid = sets[""]
    valid.prepare(mesh.barrier)
    items = [valid[index] for index in range(len(valid))]
    tokens, labels = (torch.stack([item[key] for item in items]) for key in ("tokens", "labels"))
    _, entropy = model(tokens, labels)
    for samples in (train, valid):
        samples.close()
    return float(entropy)
