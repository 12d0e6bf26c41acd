"""Work of the processes of test_activation_memory.py: the bytes of the storages that autograd keeps."""

from __future__ import annotations

from typing import Any

import torch

from examples.benchmarks.plan_memory import saved_storages
from megamult.models.architectures import architecture_of
from megamult.models.common.config import DecoderConfig
from tests.small import VOCAB


def kept(cases: list[tuple[DecoderConfig, dict[str, Any]]], sequences: int) -> list[int]:
    """Return the bytes that one forward pass of each model keeps, without parameters."""
    from megamult.distributed import start

    found = []
    for sizes, arguments in cases:
        start.initialize(arguments.get("tensor_parallel", 1))
        model = architecture_of(sizes).model()(sizes, VOCAB, 1, **{"placement": {}, **arguments})
        generator = torch.Generator().manual_seed(1)
        tokens, labels = torch.randint(0, VOCAB, (2, sequences, sizes.seq_length), generator=generator).unbind()
        with saved_storages(model) as storages:
            model(tokens.clone(), labels.clone())
        found.append(sum(storages.values()))
    return found
