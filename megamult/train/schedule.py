"""Schedule of a run: the batch of every step, and the factor of its learning rate. Pure functions of the configuration.

The batch of a step depends only on the number of samples that the run has read before. A run that resumes, in whatever
sharding, therefore goes on with the same batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from megamult.config import Config
from megamult.optim.schedule import lr_factor


class Schedule:
    """Batches and learning rates of a run."""

    def __init__(self, config: Config) -> None:
        train, ramp = config.train, config.train.batch_ramp
        self._optimizer, self._steps = config.optimizer, train.steps
        self._full, self._scaled = train.global_batch_size, ramp.lr_scaling == "sqrt"
        # Without a ramp, the first batch is the full one, and it grows 0 times.
        self._start = self._full if ramp.start is None else ramp.start
        self._increment, self._samples = ramp.increment or 0, ramp.samples or 1
        self._growths = ramp.increments(self._full)

    def batch_at(self, samples: int) -> int:
        """Return the number of sequences in the batch of the step that begins with sample `samples`.

        As in Megatron, the ramp's samples are divided into equal shares, one for each increment of the batch, and the
        batch grows by one increment whenever a share has been read. All arithmetic is in integers.
        """
        return self._start + self._increment * min(self._growths, samples * self._growths // self._samples)

    def batches(self, samples: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (first sample, number of sequences) of one batch after another, without end.

        The first one begins with sample `samples`.
        """
        while True:
            batch = self.batch_at(samples)
            yield samples, batch
            samples += batch

    def samples_after(self, samples: int, steps: int) -> int:
        """Return the number of samples read after `steps` more steps, if `samples` have been read by now."""
        while steps and (batch := self.batch_at(samples)) < self._full:
            shares = (batch - self._start) // self._increment + 1  # number of shares after which the batch grows next
            grows_at = _ceil(shares * self._samples, self._growths)
            taken = min(steps, _ceil(grows_at - samples, batch))
            samples, steps = samples + taken * batch, steps - taken
        return samples + steps * self._full

    def lr_factor(self, step: int, batch: int) -> float:
        """Return the learning rate of update `step` (counted from 0) divided by the peak.

        Args:
            batch: number of sequences in the step's batch. If train.batch_ramp.lr_scaling is `sqrt`, the
                schedule's factor is multiplied by sqrt(batch / train.global_batch_size), as in arXiv 2601.04890.
        """
        factor = lr_factor(step, self._steps, self._optimizer)
        return factor * math.sqrt(batch / self._full) if self._scaled else factor

    def lr_factors(self) -> Iterator[float]:
        """Yield the factor of every step from the run's first one on."""
        for step, (_, batch) in zip(itertools.count(), self.batches(), strict=False):
            yield self.lr_factor(step, batch)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
