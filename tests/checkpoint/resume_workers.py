"""Runs that save, and runs that go on from what others saved, on this launch's processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamult.checkpoint.config import CheckpointConfig
from tests.invariance import Case
from tests.small import VOCAB, Samples


@dataclass
class Run:
    """One run: from a checkpoint or anew, so many steps, saving on the way."""

    case: Case
    steps: int
    run_dir: Path
    load: Path | None = None
    """A checkpoint's directory; None: anew."""
    save_at: tuple[int, ...] = ()
    asynchronous: bool = True
    weights_seed: int = 1234
    """Of the initial weights: a resumed run with others must take every weight from its checkpoint."""
    reset_optimizer: bool = False
    warm: bool = False
    """Train a step before loading: everything must be replaced."""


@dataclass
class Trace:
    """What a run did."""

    records: list[dict[str, float]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Samples of all data-parallel ranks, sorted."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Everything that this rank holds at the end, by chunk."""
    new: list[str] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    """What torch draws on this rank after saving, and after loading."""


def run_all(runs: list[Run]) -> list[Trace]:
    """One after the other."""
    return [_run(run) for run in runs]


def _run(run: Run) -> Trace:
    from megamult.checkpoint import resume
    from megamult.checkpoint.saved import SavedCheckpoint
    from megamult.checkpoint.state import held
    from megamult.distributed import start
    from megamult.train.checkpoints import RunCheckpoints
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer

    config = run.case.config()
    config.train.seed = run.weights_seed
    config.checkpoint = CheckpointConfig(keep=0, asynchronous=run.asynchronous)
    mesh = start.initialize(run.case.tensor)
    saved = None if run.load is None else SavedCheckpoint(run.load).info.optimizer
    choices = {} if saved is None else saved.get("choices", {})
    engine = build(config, VOCAB, mesh, choices=choices)
    for kind, rule in engine.optimizer.rules.items():
        assert choices.get(kind, rule.choices) == rule.choices, "the same methods as before"
        assert rule.choices or config.optimizer.name == "adamw"
    samples = Samples(VOCAB, config.model.seq_length, skewed=True)
    trainer = Trainer(config, engine, samples, None, VOCAB)
    trace = Trace()
    if run.warm:
        trainer.train_step()
        trainer.close()
        samples.seen.clear()
    torch.manual_seed(0)
    if run.load is not None:
        checkpoint = SavedCheckpoint(run.load)
        trace.new = resume.new_multipliers(checkpoint, engine.partition, engine.optimizer)
        resume.restore(checkpoint, engine.partition, engine.optimizer, reset_optimizer=run.reset_optimizer)
        trainer.resume(checkpoint.info)
    saves = RunCheckpoints(run.run_dir, config, VOCAB, mesh)

    def save() -> None:
        outcome = saves.save(engine, trainer.step_count, trainer.samples, None, {})
        assert outcome is None or outcome.error is None, outcome

    if run.load is not None:
        trace.drawn = torch.rand(3).tolist()
    if trainer.step_count in run.save_at:
        save()
    for _ in range(run.steps):
        trace.records.append(trainer.train_step())
        if trainer.step_count in run.save_at:
            torch.manual_seed(torch.distributed.get_rank() + 7)
            torch.rand(5)
            save()
            trace.drawn = torch.rand(3).tolist()
    trainer.close()
    outcome = saves.wait()
    assert outcome is None or outcome.error is None, outcome
    seen: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(seen, samples.seen)
    # Samples of the step after the last one have been read ahead.
    trace.seen = sorted({index for rank in seen for index in rank if index < trainer.samples})
    trace.state = {
        f"{chunk.name}@{chunk.offsets}": chunk.load().clone() for chunk in held(engine.partition, engine.optimizer)
    }
    engine.deepspeed.destroy()
    return trace


def variant(case: Case, **changes: Any) -> Case:
    """The case with other settings."""
    return dataclasses.replace(case, **changes)
