"""One validation set: which samples an evaluation reads, and how much each of them counts.

An evaluation reads no sample twice. The first samples of each source are read, in the order of the source's first
epoch. If the set is a blend, a source keeps its share of the loss even if it has fewer samples than its share of the
evaluation: each of its samples then counts more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence

import torch

from megamult.data.blend import Blend
from megamult.data.dataset import BlendedDataset


def samples_and_shares(
    available: Sequence[int], weights: Sequence[float], limit: int | None
) -> tuple[list[int], list[float]]:
    """Divide an evaluation among the sources of a blend.

    Args:
        available: number of samples in one epoch of each source.
        weights: positive weight of each source; weights are relative.
        limit: largest number of samples that the evaluation reads; None: it reads all samples of all sources.

    Returns:
        (number of samples that are read of each source, share of each source in the loss). Shares sum to 1. With a
        limit, they are those of the blend's first `limit` samples; without one, they are in proportion to the weights.
        A source that has no sample among the blend's first `limit` samples is not read and has the share 0.
    """
    if limit is None:
        total = sum(weights)
        return list(available), [weight / total for weight in weights]
    counts = Blend(weights).counts(limit)
    return [min(both) for both in zip(counts, available, strict=True)], [count / limit for count in counts]


class ValidationSet:
    """Samples of a validation set, numbered from 0, and the weight of each in the set's loss.

    Indices from `len(self)` on are allowed: they fill the last micro-batches, and their weight is 0.

    Args:
        dataset: the corpora of the set.
        limit: largest number of samples to read; None: all.
    """

    def __init__(self, dataset: BlendedDataset, limit: int | None) -> None:
        self._dataset = dataset
        counts, shares = samples_and_shares(dataset.samples_per_epoch, dataset.weights, limit)
        self._starts = [0, *itertools.accumulate(counts)]
        self._weights = [share / count if count else 0.0 for share, count in zip(shares, counts, strict=True)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _source(self, index: int) -> int:
        """Return the position of the source that sample `index` is of."""
        return bisect.bisect_right(self._starts, index) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return sample `index`: the tensors `tokens` and `labels`, each [seq]."""
        index = min(index, len(self) - 1)
        source = self._source(index)
        return self._dataset.first_epoch_sample(source, index - self._starts[source])

    def weight(self, index: int) -> float:
        """Return the weight of a sample. The weights of all samples sum to 1."""
        return 0.0 if index >= len(self) else self._weights[self._source(index)]

    def prepare(self, barrier: Callable[[], None] | None = None) -> None:
        """Make all samples ready. Collective over all ranks."""
        self._dataset.prepare_first_epochs(barrier)

    def close(self) -> None:
        """End the background process of the corpora."""
        self._dataset.close()
