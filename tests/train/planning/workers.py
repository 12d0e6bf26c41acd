"""Work of the processes of test_plan.py: a step of real processes, for what it sends and what one process holds."""

from __future__ import annotations

from typing import Any

import torch

from megamult.config import Config
from tests.small import VOCAB
from tests.train.traffic_workers import benchmark


def sent(configs: list[Config]) -> list[float]:
    """Return the bytes that a ring moves through this rank in two micro-batches, for each configuration."""
    from megamult.distributed import start
    from megamult.train.model import build_model

    zero_stages, found = benchmark(), []
    for config in configs:
        size = start.initialize(config.parallel.tensor).size_of("tensor")
        model = build_model(config, VOCAB, 1)
        generator = torch.Generator().manual_seed(1)
        shape = (config.train.micro_batch_size, config.model.seq_length)
        batches = [tuple(torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2)) for _ in range(2)]
        with zero_stages.Wire(lambda: None, size) as wire:
            for tokens, labels in batches:
                model(tokens, labels)[0].backward()
        ring: Any = zero_stages.RING
        found.append(sum(ring[kind] * bytes_ for kind, bytes_ in wire.bytes.items()) * (size - 1) / size)
    return found


def held(config: Config) -> dict[str, int]:
    """Return the bytes of the tensors that one process has after a step, by what holds them."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    engine = build(config, VOCAB, start.initialize(1))
    tokens = torch.randint(0, VOCAB, (config.train.micro_batch_size, config.model.seq_length))
    engine.train_batch(iter([(tokens, tokens)]), 1)
    parameters = {p.data_ptr(): p.numel() * p.element_size() for p in engine.model.parameters()}
    state = [each for kept in engine.optimizer.state.values() for each in kept.values()]
    return {
        "parameters": sum(parameters.values()),
        "state": sum(each.numel() * each.element_size() for each in state if each.numel() > 1),
    }
