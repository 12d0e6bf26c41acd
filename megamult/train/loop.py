"""The training loop: optimizer steps, evaluation, records, checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.saver import Outcome
from megamult.config import Config
from megamult.data.skip import Skip
from megamult.models.architectures import architecture_of
from megamult.monitor.statistics import by_role
from megamult.runtime.patience import ON_FILES
from megamult.runtime.progress import Progress
from megamult.runtime.signals import StopRequests
from megamult.train.batches import MicroBatch, MicroBatches, Samples
from megamult.train.checkpoints import RunCheckpoints
from megamult.train.engine import Engine
from megamult.train.evaluation import Evaluation, EvaluationSamples, record_of
from megamult.train.monitoring import RunMonitor
from megamult.train.records import Records
from megamult.train.schedule import Schedule
from megamult.train.votes import mean_and_votes


class Trainer:
    """Loop that drives an engine through a run. Every rank calls every method together."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        train: Samples,
        valid: Mapping[str, EvaluationSamples] | None,
        vocab_size: int,
        progress: Progress | None = None,
        monitor: RunMonitor | None = None,
        further: Mapping[str, Callable[[dict[str, float], int], None]] = MappingProxyType({}),
    ) -> None:
        self.config, self.engine = config, engine
        self._progress = progress or Progress()
        self._monitor, self._further = monitor, further
        self._train, self._skip = train, Skip.of(config.data.skip)
        self._evaluation = Evaluation(config, engine, valid or {}, self._progress)
        self._mesh = engine.mesh
        self._schedule = Schedule(config)
        self._reading: MicroBatches | None = None
        self._flops = architecture_of(config.model).flops_per_token(config.model, vocab_size)
        self.step_count = 0
        self.samples = 0
        self.figures: dict[str, float] = {}
        self.last_multipliers: dict[str, Tensor] = {}
        self.last_checkpoint: Path | None = None
        self.bad_steps = 0
        """Number of bad steps in a row, up to now."""
        self.votes: list[float] = []
        """Sums over all ranks of the votes on stopping, from the end of the last step or evaluation."""

    def _accumulation(self, batch: int) -> int:
        """Return the number of this rank's micro-batches in a global batch of `batch` sequences."""
        return self.config.accumulation(self._mesh.size_of("data"), batch)

    def _batches(self, first: int) -> MicroBatches:
        """Return this rank's micro-batches of all training samples from `first` on.

        Micro-batches are dealt to the data-parallel ranks in rotation. A global batch is a whole number of rounds, each
        of one micro-batch for every rank, so its size does not matter here.
        """
        data_rank, data_size = self._mesh.coordinates.on("data")
        size = self.config.train.micro_batch_size
        starts = itertools.count(first + data_rank * size, data_size * size)
        return MicroBatches(self._train, starts, size, self.config.model.seq_length, self._mesh)

    def _taken(self, batches: MicroBatches, accumulation: int, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's `accumulation` micro-batches of one global batch, and take each only when it is asked for.

        Also record the progress of `step`, for the watchdog. While this rank waits for a micro-batch, the watchdog
        allows `ON_FILES` more seconds, because files may be slow. While this rank computes, the limit is as usual.
        """
        for micro in range(accumulation):
            which = f"micro-batch {micro + 1} of {accumulation}"
            self._progress.at(step, f"reading {which}", ON_FILES)
            micro_batch = batches.take()
            self._progress.at(step, which)
            yield micro_batch

    def train_step(self, ballot: Callable[[], Sequence[float]] = tuple) -> dict[str, float]:
        """Take one optimizer step, and return its record.

        Args:
            ballot: function that returns this rank's votes on stopping, called when the step is done. The
                attribute `votes` then holds their sums over all ranks.
        """
        began = time.perf_counter()
        config, step, first = self.config, self.step_count, self.samples
        schedule, batch = self._schedule, self._schedule.batch_at(first)
        self._progress.at(step + 1, "samples", ON_FILES)
        end = schedule.samples_after(first, max(1, config.train.steps - step))
        # Include the next step's samples, which are read while this step computes.
        ready = min(schedule.samples_after(first, 2), end)
        self._train.prepare(first, ready, self._mesh.barrier, end)
        if self._reading is None:
            self._reading = self._batches(first)
        self._reading.allow(ready)
        factor, accumulation = schedule.lr_factor(step, batch), self._accumulation(batch)
        self.engine.set_lr_factor(factor)
        loss = self.engine.train_batch(self._taken(self._reading, accumulation, step + 1), accumulation)
        self.step_count += 1
        self.samples += batch
        mean_loss, self.votes = mean_and_votes(self._mesh, loss, ballot())
        seconds = time.perf_counter() - began
        return {
            "step": self.step_count,
            "loss": mean_loss,
            "lr": config.optimizer.lr * factor,
            "grad_norm": self.engine.norms.main,
            "multiplier_grad_norm": self.engine.norms.multipliers,
            "batch_size": batch,
            "tokens": self.samples * config.model.seq_length,
            "tokens_per_second": batch * config.model.seq_length / seconds,
            "seconds": seconds,
            "skipped_steps": self.engine.skipped_steps,
            **{f"lr/{group}": lr for group, lr in self.engine.learning_rates.items()},
            **self.engine.further_figures,
        }

    def evaluate(self, ballot: Callable[[], Sequence[float]] = tuple) -> dict[str, float]:
        """Evaluate every validation set, and return the record (:func:`megamult.train.evaluation.record_of`).

        Args:
            ballot: function that returns this rank's votes on stopping, called at the end. The attribute `votes`
                then holds their sums over all ranks.
        """
        losses, self.votes = self._evaluation.losses(self.step_count, ballot)
        return record_of(losses)

    def multipliers(self) -> dict[str, Tensor]:
        """Return the values of all multipliers by "role/side", such as "q/row". Only on global rank 0 are they
        certain to be complete. Collective over all ranks."""
        return by_role((item.role, item.side or "", item.tensor.cpu()) for item in self.engine.multipliers())

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def resume(self, info: CheckpointInfo) -> list[str]:
        """Continue after the step at which a checkpoint was saved, with the next sample of every source.

        Returns:
            Lines about the data sources for the user to read.
        """
        self.close()
        self.step_count, self.samples, self.figures = info.step, info.samples, dict(info.figures)
        self.bad_steps = int(self.figures.get("bad_steps", 0))
        return [] if info.data is None else self._train.load_state_dict(info.data, info.samples)

    def run(self, run_dir: Path, checkpoints: RunCheckpoints, stop: StopRequests) -> str | None:
        """Take all remaining steps, with evaluation, records and checkpoints. Global rank 0 writes the records.

        Returns:
            The reason why the run stopped before its last step, or None if the run is complete.

        Raises:
            CheckpointFailed: the last checkpoint could not be written. Every rank raises this.
            Diverged: `train.max_bad_steps` steps in a row were bad (see :class:`Diverged`). Every rank raises this.
        """
        steps, reason, outcome, unsaved = self.config.train.steps, None, None, False
        total = self._schedule.samples_after(self.samples, max(0, steps - self.step_count))
        with contextlib.ExitStack() as stack:
            # Wait for a checkpoint that is being written, so that it is completed even if training fails.
            stack.callback(checkpoints.wait, _LAST_SAVE_SECONDS)
            stack.callback(self.close)
            records = stack.enter_context(
                Records(
                    run_dir,
                    self.config.train,
                    self._flops,
                    self._mesh,
                    self.step_count,
                    self.engine.skipped_steps,
                    (total, self.samples),
                    self._outputs(),
                )
            )
            while self.step_count < steps and reason is None:
                self._recorded_step(records, stop)
                last = self.step_count == steps
                self._look(records, stop, last)
                self._progress.at(self.step_count, "after the records")
                reason = None if last else stop.decided(self.votes)
                records.checkpoint(checkpoints.poll())
                # Save no checkpoint while steps are bad, because the weights may be bad already.
                unsaved |= checkpoints.due(self.step_count)
                if last or reason or (unsaved and not self.bad_steps):
                    unsaved = False
                    outcome = self._save(checkpoints)
                    records.checkpoint(outcome)
                    self._progress.at(self.step_count, "after the checkpoint")
            self._progress.at(self.step_count, "the last checkpoint's end", ON_FILES)
            awaited = checkpoints.wait()
            records.checkpoint(awaited)
        outcome = awaited or outcome
        if outcome is not None and outcome.error is None:
            self.last_checkpoint = outcome.path
        elif outcome is not None and outcome.step == self.step_count:
            raise CheckpointFailed(outcome, reason)
        return reason

    def _outputs(self) -> dict[str, Callable[[dict[str, float]], None]]:
        """Return the functions that write figures of the present step to outputs other than the run's own files: to
        the engine's monitors, and to the run's further outputs."""

        def over(
            count: Callable[[], int], write: Callable[[dict[str, float], int], None]
        ) -> Callable[[dict[str, float]], None]:
            return lambda figures: write(figures, count())

        of_engine = {name: over(lambda: self.samples, write) for name, write in self.engine.monitors.items()}
        return of_engine | {name: over(lambda: self.step_count, write) for name, write in self._further.items()}

    def _recorded_step(self, records: Records, stop: StopRequests) -> None:
        """Take one optimizer step and record its figures, and those of the monitor if they are due.

        Raises:
            Diverged: there are now `train.max_bad_steps` bad steps in a row.
        """
        skipped, limit = self.engine.skipped_steps, self.config.train.max_bad_steps
        samples = self.samples
        monitor = self._monitor if self._monitor is not None and self._monitor.due(self.step_count + 1) else None
        if monitor is not None:
            monitor.begin()
        record = self.train_step(stop.ballot)
        bad = record["skipped_steps"] > skipped or not math.isfinite(record["loss"])
        self.bad_steps = self.bad_steps + 1 if bad else 0
        self.figures |= {key: record[key] for key in ("tokens", "loss")} | {"bad_steps": float(self.bad_steps)}
        self._progress.at(self.step_count, "records", ON_FILES)
        records.step(record)
        for first, last in self._skip.passed(samples, self.samples):
            records.say(f"step {self.step_count}: samples {first} to {last} are left out (data.skip)")
        if monitor is not None:
            self._progress.at(self.step_count, "the monitor's figures", ON_FILES)
            records.figures(self.step_count, monitor.figures(self.step_count))
        if limit and self.bad_steps >= limit:
            raise Diverged(self.step_count, self.bad_steps, record)

    def _look(self, records: Records, stop: StopRequests, last: bool) -> None:
        """Record histograms of the multipliers, and evaluate, each only if it is due after this step."""
        train, step = self.config.train, self.step_count
        every = train.log_histograms_every
        if self.config.multipliers.implementation != "none" and (last or (every and step % every == 0)):
            self.last_multipliers = self.multipliers()
            if every:
                records.histograms(self.last_multipliers, step)
        if self._evaluation and (last or (train.eval_every and step % train.eval_every == 0)):
            record = self.evaluate(stop.ballot)
            self.figures["valid_loss"] = record["valid_loss"]
            records.evaluation(step, record)

    def _save(self, checkpoints: RunCheckpoints) -> Outcome | None:
        """Begin to save a checkpoint. Return the outcome of this save or the previous one, or None, as
        :meth:`RunCheckpoints.save` does."""
        self._progress.at(self.step_count, "checkpoint", ON_FILES)
        data, figures = self._train.state_dict(), dict(self.figures)
        return checkpoints.save(self.engine, self.step_count, self.samples, data, figures)


_LAST_SAVE_SECONDS = 60.0
"""Longest time, in seconds, that a failing run waits for a checkpoint that is being written. A longer wait may be in
vain, because other ranks may be gone."""


class Diverged(Exception):
    """Error: `train.max_bad_steps` steps in a row were bad. In a bad step, the loss or a gradient is not finite, or the
    gradient norm is above optimizer.skip_grad_norm."""

    def __init__(self, step: int, bad: int, record: dict[str, float]) -> None:
        self.last_good_step = step - bad
        super().__init__(
            f"the last {bad} steps, {step - bad + 1} to {step}, were bad (train.max_bad_steps): loss "
            f"{record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
        )


class CheckpointFailed(Exception):
    """Error: the last checkpoint of a run could not be written."""

    def __init__(self, outcome: Outcome, reason: str | None) -> None:
        super().__init__(f"the checkpoint of step {outcome.step} could not be written ({outcome.error})")
        self.reason = reason
        """Reason why the run had stopped before its last step, or None if the run was complete."""
