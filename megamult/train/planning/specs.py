"""Specs of all parameters of a run's model, without memory for any, so that every sharding of it can be planned."""

from __future__ import annotations

import dataclasses

from megamult.config import Config
from megamult.distributed import device, stand_in
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import named_specs
from megamult.train.model import build_model


def model_specs(config: Config, vocab_size: int) -> dict[str, ParameterSpec]:
    """Return the specs of all trainable parameters by name, in the model's order.

    The specs are those of tensor parallel 1. They say how every tensor-parallel size shards a parameter, and differ
    from those of other sizes only in what the optimizer step still sums (`reduce_over`).

    Args:
        config: configuration of the run.
        vocab_size: exact number of tokens, without padding.
    """
    parallel = dataclasses.replace(config.parallel, tensor=1, sequence=False)
    # The token that ends documents changes forward passes only.
    data = dataclasses.replace(config.data, document_mask=False)
    described = dataclasses.replace(config, parallel=parallel, data=data)
    with stand_in.alone(), device.describing():
        model = build_model(described, vocab_size, None)
    return {name: spec for name, _, spec in named_specs(model)}
