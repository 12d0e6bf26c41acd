"""Runs whose batch grows, and the same steps by hand: each batch in one piece, so that nothing is accumulated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamult.config import Config
from tests.invariance import LR, Case, run_cases
from tests.small import VOCAB, Samples

BATCHES = (4, 4, 8, 12, 16)
FACTORS = (0.5 * 0.5, 0.5, 0.5**0.5, 0.75**0.5, 1.0)
"""Learning rate over its peak: two steps of warm-up, times sqrt(batch / 16)."""


@dataclass(frozen=True)
class Ramp(Case):
    """A case whose batches are BATCHES."""

    knobs: str = "ramp"
    accumulation: int = 2
    scaled: bool = True
    """Whether the learning rate follows the batch."""
    constant: bool = False
    """Whether the multipliers' learning rate is constant."""

    def config(self) -> Config:
        config = super().config()
        config.train.batch_ramp = replace(config.train.batch_ramp, lr_scaling="sqrt" if self.scaled else "none")
        config.multipliers.schedule = "constant" if self.constant else "same"
        return config


@dataclass
class Steps:
    """Losses and gradient norms of all steps, and every logical tensor at the end."""

    losses: list[float]
    norms: list[float]
    multiplier_norms: list[float]
    tensors: dict[str, Tensor]


def both(cases: list[Ramp]) -> list[tuple[Steps, Steps]]:
    """Each case as the loop runs it, and by hand."""
    return [(_run(case), _by_hand(case)) for case in cases]


def _run(case: Ramp) -> Steps:
    (outcome,) = run_cases([case])
    assert [record["batch_size"] for record in outcome.records] == list(BATCHES)
    keys = ("loss", "grad_norm", "multiplier_grad_norm")
    return Steps(*([record[key] for record in outcome.records] for key in keys), outcome.tensors)


def _by_hand(case: Ramp) -> Steps:
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.zero.gather import trained

    config = replace(case, knobs="", accumulation=1, scaled=True).config()  # without a ramp
    engine = build(config, VOCAB, start.initialize(1))
    samples = Samples(VOCAB, config.model.seq_length, period=16)
    steps, first = Steps([], [], [], {}), 0
    for step, (batch, factor) in enumerate(zip(BATCHES, FACTORS, strict=True)):
        rows = [samples[i] for i in range(first, first + batch)]
        first += batch
        for group in engine.optimizer.param_groups:
            warm = 0.5 if step == 0 else 1.0
            constant = case.constant and group["kind"] == "multiplier"
            group["lr"] = LR * (1.0 if constant else factor if case.scaled else warm)
        objective, entropy = engine.deepspeed(
            *(torch.stack([row[key] for row in rows]) for key in ("tokens", "labels"))
        )
        engine.deepspeed.backward(objective)
        engine.deepspeed.step()
        steps.losses.append(entropy.item())
        steps.norms.append(engine.norms.main)
        steps.multiplier_norms.append(engine.norms.multipliers)
    steps.tensors = {
        item.name: item.tensor.clone() for item in trained(engine.model, engine.partition, engine.optimizer)
    }
    engine.deepspeed.destroy()
    return steps
