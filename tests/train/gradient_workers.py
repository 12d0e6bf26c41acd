"""Work of the processes of test_gradient_sums.py: reduce gradients by DeepSpeed, and average them themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.train.config import TrainConfig
from tests.small import SMALL, VOCAB

MICRO_BATCHES = 2


def _config(stage: int, ranks: int, deepspeed: dict[str, Any] | None = None) -> Config:
    return Config(
        model=replace(SMALL, num_layers=1),
        parallel=ParallelConfig(zero_stage=stage),
        train=TrainConfig(steps=1, global_batch_size=MICRO_BATCHES * ranks, micro_batch_size=1, dtype="bf16"),
        deepspeed=deepspeed,
    )


def _batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a data-parallel rank."""
    generator = torch.Generator().manual_seed(rank)
    texts = [torch.randint(0, VOCAB, (1, SMALL.seq_length + 1), generator=generator) for _ in range(MICRO_BATCHES)]
    return [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts]


def _averages(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over ranks and micro-batches, in float64, of the bf16 gradients and of their magnitudes, by parameter."""
    from megamult.multipliers.parameters import FULL_PRECISION
    from megamult.parameters.stated import named_specs
    from megamult.train.model import build_model

    model = build_model(config, VOCAB, config.train.seed)
    for _, parameter, spec in named_specs(model):
        if spec.kind == "multiplier":  # as the engine's optimizer makes forward passes scale
            setattr(parameter, FULL_PRECISION, parameter.detach().float())
    mean = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    magnitude = {name: torch.zeros_like(total) for name, total in mean.items()}
    terms = config.train.global_batch_size
    for tokens, labels in _batches(torch.distributed.get_rank()):
        model.zero_grad()
        model(tokens, labels)[0].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
            mean[name] += parameter.grad.double() / terms
            magnitude[name] += parameter.grad.double().abs() / terms
    for total in (*mean.values(), *magnitude.values()):
        torch.distributed.all_reduce(total)
    return mean, magnitude


def reduction_errors(stages: list[int], deepspeed: dict[str, Any] | None = None) -> dict[int, float]:
    """Return the largest error of the reduced gradients that this rank's optimizer gets, by ZeRO stage: the distance to
    the mean of all gradients, in units of the mean of their magnitudes."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    mesh = start.initialize(1)
    ranks = torch.distributed.get_world_size()
    mean, magnitude = _averages(_config(1, ranks))
    errors = {}
    for stage in stages:
        engine = build(_config(stage, ranks, deepspeed), VOCAB, mesh)
        for tokens, labels in _batches(torch.distributed.get_rank()):
            objective, _ = engine.deepspeed(tokens, labels)
            engine.deepspeed.backward(objective)
            last = engine.deepspeed.is_gradient_accumulation_boundary()
            if not last:
                engine.deepspeed.step()
        assert last
        errors[stage] = 0.0
        for piece, gradient in zip(engine.partition.slices, engine.partition.gradients(), strict=True):
            of = slice(piece.start, piece.start + piece.length)
            off = (gradient.double() - mean[piece.name].view(-1)[of]).abs()
            scale = magnitude[piece.name].view(-1)[of]
            assert bool((off[scale == 0] == 0).all())
            errors[stage] = max(errors[stage], float((off / scale)[scale > 0].max()) if bool((scale > 0).any()) else 0)
        engine.deepspeed.destroy()
    return errors
