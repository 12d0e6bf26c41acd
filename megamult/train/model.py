"""Construction of a run's model from its configuration, and a warning if the model could not be exported."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamult.config import Config
from megamult.models.architectures import architecture_of


def build_model(
    config: Config,
    vocab_size: int,
    seed: int | None,
    note: Callable[[str], None] = lambda doing: None,
    *,
    eod: int | None = None,
) -> torch.nn.Module:
    """Build this rank's part of a run's model (see :class:`megamult.models.common.architecture.ModelClass`).

    Args:
        config: configuration of the run.
        vocab_size: exact number of tokens, without padding.
        seed: seed of the initial weights. If it is None, all weights that would be drawn are NaN until a
            checkpoint is loaded.
        note: function that is called once per parameter, with a description of the work.
        eod: id of the token that ends a document. `data.document_mask` needs it.

    Raises:
        ValueError: `data.document_mask` is true and `eod` is None.
    """
    if config.data.document_mask and eod is None:
        raise ValueError("data.document_mask is true and eod is None: give the id of the token that ends a document")
    multipliers = config.multipliers
    return architecture_of(config.model).model()(
        config.model,
        vocab_size,
        seed,
        placement=multipliers.placement if multipliers.implementation == "layer" else {},
        shared_columns=multipliers.implementation == "layer" and multipliers.shared_columns,
        dtype=config.train.torch_dtype,
        tensor_parallel=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        recompute=config.train.recompute == "full",
        initial=multipliers.initial_values(),
        document_end=eod if config.data.document_mask else None,
        note=note,
    )


def export_warnings(config: Config) -> list[str]:
    """Return a warning if no class of transformers can express a run's model, so that an export would be refused."""
    try:
        architecture_of(config.model).to_hugging_face(config.model, 1, tied=False, dtype="float32", token_ids={})
    except ValueError as error:
        return [str(error)]
    return []
