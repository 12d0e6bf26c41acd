"""Figures of a monitored step under some shardings, and the same figures from whole tensors in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamult.monitor.names import key, layer_of
from tests.invariance import Case
from tests.small import VOCAB, Samples

STEPS = 3
"""The last of them is monitored."""


def run_cases(cases: list[Case]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(figures, figures from whole tensors) of each case, on this launch's processes; the latter on rank 0 only."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer
    from megamult.train.monitoring import RunMonitor
    from megamult.zero.gather import trained

    outcomes = []
    for case in cases:
        torch.compiler.reset()
        config = case.config()
        mesh = start.initialize(case.tensor)
        engine = build(config, VOCAB, mesh)
        samples = Samples(VOCAB, config.model.seq_length, period=config.train.global_batch_size)
        trainer = Trainer(config, engine, samples, None, VOCAB)
        monitor = RunMonitor(config, engine.model, engine.partition, engine.optimizer, VOCAB)

        def whole(engine: Any = engine) -> dict[str, Any]:
            return {item.name: item for item in trained(engine.model, engine.partition, engine.optimizer)}

        for _ in range(STEPS - 1):
            trainer.train_step()
        before = {name: item.tensor.cpu().clone() for name, item in whole().items()}
        monitor.begin()
        trainer.train_step()
        figures = monitor.figures(STEPS)
        outcomes.append((figures, by_hand(before, whole())))
        assert monitor.figures(STEPS).keys() & {"logits_rms", "update_rms/q"} == {"logits_rms"}, "nothing is armed"
        trainer.close()
        engine.deepspeed.destroy()
    return outcomes


def by_hand(before: dict[str, Tensor], items: dict[str, Any]) -> dict[str, float]:
    """Figures of weights and multipliers by role and layer."""
    found: dict[str, float] = {}
    for name, item in items.items():
        if item.side is not None:
            logs = item.tensor.cpu().double().abs().log()
            found[key(f"{item.side}_log_mean", item.role, layer_of(name))] = logs.mean().item()
            if item.side != "scalar":
                found[key(f"{item.side}_log_std", item.role, layer_of(name))] = logs.std(correction=0).item()
            continue
        if item.tensor.dim() != 2:  # a norm, or a convolution, of which a layer has several
            continue
        module = name.rpartition(".")[0]
        sides = {
            side: items[f"{module}.{side}_multiplier"].tensor.cpu().double()
            for side in ("row", "col", "scalar")
            if f"{module}.{side}_multiplier" in items
        }
        weight = item.tensor.cpu().double()
        change = weight - before[name].double()
        found[key("update_rms", item.role, layer_of(name))] = change.square().mean().sqrt().item()
        effective = weight * sides.get("row", torch.ones(1).double())[:, None] * sides.get("col", 1.0)
        effective = effective * sides.get("scalar", 1.0)
        for what, matrix in (("weight", weight), ("effective", effective))[: 2 if sides else 1]:
            found[key(f"{what}_rms", item.role, layer_of(name))] = matrix.square().mean().sqrt().item()
            for side, dim in (("row", 1), ("col", 0)):
                norms = matrix.norm(dim=dim)
                variation = (norms.std(correction=0) / norms.mean()).item()
                found[key(f"{what}_{side}_cv", item.role, layer_of(name))] = variation
    return found
