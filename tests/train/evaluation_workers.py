"""Evaluations of a model on the ranks of a launch, and the plain loop that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.invariance import Case
from tests.small import SMALL, VOCAB, Samples, ValidSamples

SETS = {"speeches": 17, "code": 3}
"""Sizes of the validation sets. Neither is a multiple of a micro-batch, and the second leaves ranks without samples."""
OFFSETS = {"speeches": 1000, "code": 2000}


@dataclass(frozen=True)
class Layout(Case):
    """A case whose global batch is 16."""

    micro: int = 4
    document_mask: bool = False


def sets() -> dict[str, ValidSamples]:
    """Both validation sets."""
    return {name: ValidSamples(n, VOCAB, SMALL.seq_length, OFFSETS[name]) for name, n in SETS.items()}


def plain_losses(layout: Layout) -> dict[str, float]:
    """Loss of each set: one sample after another through the model at its start, and the mean."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    engine = build(replace(layout, knobs="").config(), VOCAB, start.initialize(1))
    found = {}
    with torch.no_grad():
        for name, count in SETS.items():
            samples, losses = Samples(VOCAB, SMALL.seq_length, offset=OFFSETS[name]), []
            for index in range(count):
                item = samples[index]
                losses.append(float(engine.model(item["tokens"][None], item["labels"][None])[1]))
            found[name] = sum(losses) / count
    engine.deepspeed.destroy()
    return found


def evaluated(layouts: list[Layout], folder: Path | None = None) -> list[tuple[dict[str, float], list[int]]]:
    """(record of an evaluation, indices that this rank has read of the first set) for each layout.

    Args:
        folder: where the first layout's figures are written, by a run without a step.
    """
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer
    from megamult.train.records import Records

    found = []
    for layout in layouts:
        config = layout.config()
        config.train.global_batch_size, config.train.micro_batch_size = 16, layout.micro
        mesh = start.initialize(layout.tensor)
        engine, valid = build(config, VOCAB, mesh), sets()
        trainer = Trainer(config, engine, Samples(VOCAB, SMALL.seq_length), valid, VOCAB)
        record = trainer.evaluate()
        if folder is not None and layout is layouts[0]:
            with Records(folder, config.train, 1.0, mesh, 0, 0, (0, 0), {}) as records:
                records.evaluation(0, record)
        found.append((record, valid["speeches"].seen))
        engine.deepspeed.destroy()
    return found
