"""Records of a run: global rank 0 adds memory and utilization to each step's figures, and writes all figures of the run
to the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from megamult.checkpoint.saver import Outcome
from megamult.distributed import device
from megamult.distributed.mesh import Mesh
from megamult.monitor.writers import Writers
from megamult.train.config import TrainConfig


class Records:
    """Writer of a run's figures on global rank 0. On other ranks it does nothing.

    Args:
        run_dir: directory that the figures are written to.
        train: section `train` of the run's configuration.
        flops: floating-point operations per token, forward and backward.
        mesh: mesh of the processes.
        done: number of steps that earlier starts of the run have taken.
        skipped: number of these steps whose update the optimizer skipped, because a gradient was not finite or its norm
            was above `optimizer.skip_grad_norm`.
        samples: (number of sequences that the whole run reads, number of sequences that it has read so far).
        further: further outputs of the figures, see :class:`megamult.monitor.writers.Writers`.
    """

    def __init__(
        self,
        run_dir: Path,
        train: TrainConfig,
        flops: float,
        mesh: Mesh,
        done: int,
        skipped: int,
        samples: tuple[int, int],
        further: Mapping[str, Callable[[dict[str, float]], None]],
    ) -> None:
        first = mesh.rank == 0
        self._out = Writers(run_dir, train.steps, done, skipped, samples, further) if first else None
        peak = device.peak_flops(train.torch_dtype)
        self._peak = None if peak is None else peak * mesh.size
        self._flops = flops

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.__exit__(kind, error, trace)

    def step(self, record: dict[str, float]) -> None:
        """Record a training step, this rank's memory and, if the device's peak is known, the run's utilization."""
        extra = {"memory_bytes": float(device.memory_bytes())}
        if self._peak is not None:
            extra["mfu"] = record["tokens_per_second"] * self._flops / self._peak
        if self._out is not None:
            self._out.step(record, extra)

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Record an evaluation (:func:`megamult.train.evaluation.record_of`)."""
        if self._out is not None:
            self._out.evaluation({"step": step, **losses})

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Record the monitor's figures of a step."""
        if self._out is not None:
            self._out.figures(step, figures)

    def histograms(self, values: dict[str, Tensor], step: int) -> None:
        """Record histograms of the multipliers of each role and side."""
        if self._out is not None:
            self._out.histograms(values, step)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._out is not None:
            self._out.say(text)

    def checkpoint(self, outcome: Outcome | None) -> None:
        """Record the outcome of a checkpoint's save. Do nothing if it is None, which means that no save has ended."""
        if self._out is None or outcome is None:
            return
        if outcome.error is None:
            self._out.checkpoint(outcome.step, outcome.path, outcome.stall_seconds, outcome.seconds)
        else:
            self._out.say(f"warning: {outcome.path} could not be written ({outcome.error}); training goes on")
