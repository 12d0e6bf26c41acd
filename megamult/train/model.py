"""A run's configuration becomes its model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamult.config import Config
from megamult.models.architectures import architecture_of


def build_model(
    config: Config, vocab_size: int, seed: int | None, note: Callable[[str], None] = lambda doing: None
) -> torch.nn.Module:
    """Build this rank's part of a run's model, as :class:`megamult.models.common.architecture.ModelClass`.

    Args:
        config: of the run.
        vocab_size: exact, without padding.
        seed: of the weights; None: they are NaN until a checkpoint is loaded.
        note: told what is being done, a parameter at a time.
    """
    multipliers = config.multipliers
    return architecture_of(config.model).model()(
        config.model,
        vocab_size,
        seed,
        placement=multipliers.placement if multipliers.implementation == "layer" else {},
        dtype=config.train.torch_dtype,
        tensor_parallel=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        recompute=config.train.recompute == "full",
        note=note,
    )
