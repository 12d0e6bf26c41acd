"""Output of a run's figures on rank 0: metrics.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megamult.monitor import screen
from megamult.runtime.console import reason_of

_FLUSH_SECONDS = 10
"""Seconds between flushes of TensorBoard's figures. A crash can lose the figures of this time, and a viewer sees
figures with this delay."""


_PAUSE = (5.0, 120.0)
"""Shortest and longest time in seconds between two lines of steps where the screen is no terminal. In between, a line
comes whenever a tenth of the time since the start has passed since the last line."""


class Writers:
    """Writer of one record per step to `metrics.jsonl` and `tensorboard/`, and of the run's progress to the screen.

    On a terminal the progress is a bar on standard error. Elsewhere it is lines on standard output: for the first and
    the last step, and in between every 5 seconds at first and every 2 minutes later.

    Args:
        run_dir: run directory, which may hold earlier figures of the same run.
        steps: number of steps of the whole run.
        done: number of steps that are done. Records of later steps, written before a crash, are dropped.
        skipped: number of skipped steps among those that are done.
        samples: (number of sequences that the whole run reads, number that it has read so far). The bar counts
            sequences and not steps, because the remaining time follows from sequences even if batches grow.
        further: functions that get every figure that TensorBoard gets, {name: value}, by the name of the output that
            they write to. One that fails does not keep the others from theirs.
        clock: function that returns the time, in seconds since 1970.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        done: int = 0,
        skipped: int = 0,
        samples: tuple[int, int] = (0, 0),
        further: Mapping[str, Callable[[dict[str, float]], None]] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_after(run_dir / "metrics.jsonl", done)
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1, flush_secs=_FLUSH_SECONDS)
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"step {done}/{steps}",
            total=samples[0],
            initial=samples[1],
            unit="seq",
            dynamic_ncols=True,
            disable=not self._interactive,
        )
        self._steps, (self._total, self._read) = steps, samples
        self._clock = clock
        self._began: tuple[float, int] | None = None  # (time, samples read by then) after this start's first step
        self._told = -math.inf
        self._further = further
        self._skipped = skipped
        self._failed: set[str] = set()

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for name, close in (("tensorboard", self._tensorboard.close), ("metrics.jsonl", self._metrics.close)):
            with self._going_on(name):
                close()

    def step(self, record: dict[str, float], extra: dict[str, float]) -> None:
        """Record a training step.

        `record` goes to metrics.jsonl and TensorBoard, `extra` (memory, utilization) only to TensorBoard.
        """
        self._line(record)
        step = int(record["step"])
        if record["skipped_steps"] > self._skipped:
            self._skipped = int(record["skipped_steps"])
            why = (
                f"the gradient norm is above optimizer.skip_grad_norm ({record['grad_norm']:.4g} without multipliers, "
                f"{record['multiplier_grad_norm']:.4g} of multipliers)"
            )
            if not all(math.isfinite(record[key]) for key in ("grad_norm", "multiplier_grad_norm")):
                why = "a gradient is not finite"
            self.say(f"step {step}: {why}, so the step changes no weight ({self._skipped} steps skipped so far)")
        self._scalars("train", {k: v for k, v in {**record, **extra}.items() if k != "step"}, step)
        mfu = extra.get("mfu")
        self._read += int(record["batch_size"])
        if self._interactive:
            self._bar.set_description_str(f"step {step}/{self._steps}", refresh=False)
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {screen.speed(record, mfu)}", refresh=False)
            self._bar.update(record["batch_size"])
        else:
            self._tell(record, mfu)

    def _tell(self, record: dict[str, float], mfu: float | None) -> None:
        """Print the line of a step, if one is due."""
        now, left = self._clock(), None
        if self._began is None:
            # The first step also compiles, allocates and opens files: the pace is that of the steps after it.
            self._began = now, self._read
        elif self._read > self._began[1] and record["step"] < self._steps:
            left = (now - self._began[0]) * (self._total - self._read) / (self._read - self._began[1])
        shortest, longest = _PAUSE
        pause = min(longest, max(shortest, (now - self._began[0]) / 10))
        if now - self._told >= pause or record["step"] == self._steps:
            self._told = now
            clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
            self.say(screen.step_line(record, self._steps, clock, left, mfu))

    def evaluation(self, record: dict[str, float]) -> None:
        """Record an evaluation: the mean loss `valid_loss`, and `valid/NAME/loss` of each named validation set."""
        self._line(record)
        named = {key: loss for key, loss in record.items() if key.startswith("valid/")}
        self._scalars("valid", {"loss": record["valid_loss"], **named}, int(record["step"]))
        each = ", ".join(f"{key.split('/')[1]} {loss:.4f}" for key, loss in named.items())
        self.say(f"step {record['step']}: valid loss {record['valid_loss']:.4f}{f' ({each})' if each else ''}")

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Record the monitor's figures of a step: one line of metrics.jsonl, and a point of each figure's curve in
        TensorBoard."""
        self._line({"step": step, **figures})
        self._points(figures, step)

    def histograms(self, values: dict[str, Tensor], step: int) -> None:
        """Write histograms of the multipliers of each role and side."""
        with self._going_on("tensorboard"):
            for key, vector in values.items():
                self._tensorboard.add_histogram(f"multipliers/{key}", vector, step)

    def checkpoint(self, step: int, path: Path, stall_seconds: float, seconds: float) -> None:
        """Record a complete checkpoint."""
        self._scalars("checkpoint", {"stall_seconds": stall_seconds, "seconds": seconds}, step)
        self.say(f"saved {path} in {seconds:.1f} s (training stopped for {stall_seconds:.2f} s)")

    def say(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        with contextlib.suppress(OSError):  # standard output may be a file on a full disk, or a closed pipe
            self._bar.write(text, file=sys.stdout) if self._interactive else print(text, flush=True)

    def _scalars(self, section: str, values: dict[str, float], step: int) -> None:
        # A figure with a section in its name keeps it: lr/matrix.
        self._points({key if "/" in key else f"{section}/{key}": value for key, value in values.items()}, step)

    def _points(self, figures: dict[str, float], step: int) -> None:
        with self._going_on("tensorboard"):
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
        for output, write in self._further.items():
            with self._going_on(output, Exception):  # other packages write here, whose errors are of any kind
                write(figures)

    def _line(self, record: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        finite["time"] = round(self._clock(), 3)
        with self._going_on("metrics.jsonl"):
            self._metrics.write(json.dumps(finite, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def _going_on(self, name: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """Let the run continue if writing `name` ends in one of `errors`, and say once that metrics may be missing."""
        try:
            yield
        except errors as error:
            if name not in self._failed:
                self._failed.add(name)
                said = f"warning: {name} cannot be written ({reason_of(error)})"
                self.say(f"{said}; training continues, and metrics may be missing")


def _drop_after(metrics: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a line that a crash cut off."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    rewritten = metrics.with_name(metrics.name + ".tmp")
    rewritten.write_text("".join(kept), encoding="utf-8")
    rewritten.replace(metrics)
