"""The training loop: batches in, steps, evaluation, figures out."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.saver import Outcome
from megamult.config import Config
from megamult.distributed import device, mesh
from megamult.models.llama.flops import flops_per_token
from megamult.monitor.statistics import by_role
from megamult.monitor.writers import Writers
from megamult.optim.schedule import lr_factor
from megamult.runtime.patience import ON_FILES
from megamult.runtime.progress import Progress
from megamult.runtime.signals import StopRequests
from megamult.train.batches import MicroBatches, Readable
from megamult.train.checkpoints import RunCheckpoints
from megamult.train.engine import Engine
from megamult.zero.gather import trained


class Samples(Readable, Protocol):
    """Sample i of a run: a function of i only, whatever the layout (:class:`megamult.data.BlendedDataset`)."""

    def prepare(self, first: int, last: int, barrier: Callable[[], None], end: int) -> None:
        """Make samples [first, last) ready, and the run's others, before `end`, in time; all ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of them."""

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """Go on before global sample `samples` of a run that left `state`; return lines that a user should read."""


class Trainer:
    """Drives an engine over a run. Every rank calls every method together."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        train: Samples,
        valid: Samples | None,
        vocab_size: int,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.engine = config, engine
        self._progress = progress or Progress()
        self._train, self._valid = train, valid
        self._data_rank = mesh.data_group().rank()
        self._accumulation = config.accumulation(mesh.data_group().size())
        self._reading: MicroBatches | None = None
        self._flops = flops_per_token(config.model, vocab_size)
        self.step_count = 0
        self.samples = 0
        self.figures: dict[str, float] = {}
        self.last_multipliers: dict[str, Tensor] = {}
        self.last_checkpoint: Path | None = None
        self.bad_steps = 0
        """In a row."""
        self.votes: list[float] = []
        """Sums over all ranks of what was voted at the end of the last step."""

    def _batches(self, samples: Samples, first: int) -> MicroBatches:
        """This rank's micro-batches of the global batches from sample `first` on."""
        train, data_size = self.config.train, mesh.data_group().size()
        size = train.micro_batch_size
        starts = (
            batch + (micro * data_size + self._data_rank) * size
            for batch in itertools.count(first, train.global_batch_size)
            for micro in range(self._accumulation)
        )
        return MicroBatches(samples, starts, size, self.config.model.seq_length)

    def _micro_batch(self, batches: MicroBatches, micro: int, step: int, of: str = "") -> tuple[Tensor, Tensor]:
        """Tokens and labels, [micro batch, seq] each.

        Notes the progress of `step`: waiting for them is work on files, what follows it is not.
        """
        which = f"micro-batch {micro + 1} of {self._accumulation}{of}"
        self._progress.at(step, f"reading {which}", ON_FILES)
        tokens, labels = batches.take()
        self._progress.at(step, which)
        return tokens, labels

    def train_step(self, ballot: Callable[[], Sequence[float]] = tuple) -> dict[str, float]:
        """One optimizer step; returns the step's record.

        Args:
            ballot: asked for this rank's vote when the step is done; `votes` then holds the sums over all ranks.
        """
        began = time.perf_counter()
        config, step, first = self.config, self.step_count, self.samples
        batch = config.train.global_batch_size
        self._progress.at(step + 1, "samples", ON_FILES)
        end = first + max(1, config.train.steps - step) * batch
        # The next step's too: they are read while this one computes.
        ready = min(first + 2 * batch, end)
        self._train.prepare(first, ready, torch.distributed.barrier, end)
        if self._reading is None:
            self._reading = self._batches(self._train, first)
        self._reading.allow(ready)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, config.train.steps, config.optimizer)
        loss = torch.zeros((), device=device.local_device())
        for micro in range(self._accumulation):
            tokens, labels = self._micro_batch(self._reading, micro, step + 1)
            objective, entropy = self.engine.deepspeed(tokens, labels)
            self.engine.deepspeed.backward(objective)
            self.engine.deepspeed.step()
            loss += entropy.float()
        self.step_count += 1
        self.samples += batch
        norms = self.engine.optimizer.norms
        assert norms is not None
        mean_loss, self.votes = mean_and_votes(loss / self._accumulation, ballot())
        seconds = time.perf_counter() - began
        tokens_per_step = batch * config.model.seq_length
        return {
            "step": self.step_count,
            "loss": mean_loss,
            "lr": config.optimizer.lr * lr_factor(step, config.train.steps, config.optimizer),
            "grad_norm": norms.main,
            "multiplier_grad_norm": norms.multipliers,
            "tokens": self.samples * config.model.seq_length,
            "tokens_per_second": tokens_per_step / seconds,
            "seconds": seconds,
            "skipped_steps": self.engine.optimizer.skipped_steps,
        }

    @torch.no_grad()
    def evaluate(self, ballot: Callable[[], Sequence[float]] = tuple) -> float:
        """Mean cross entropy in nats over the first `train.eval_batches` global batches of data.valid.

        Args:
            ballot: asked for this rank's vote at the end, as in :meth:`train_step`, whose `votes` it replaces.
        """
        assert self._valid is not None
        config = self.config
        self._progress.at(self.step_count, "samples of the evaluation", ON_FILES)
        end = config.train.eval_batches * config.train.global_batch_size
        self._valid.prepare(0, end, torch.distributed.barrier, end)
        self.engine.deepspeed.eval()
        loss = torch.zeros((), device=device.local_device())
        with contextlib.closing(self._batches(self._valid, 0)) as batches:
            batches.allow(end)
            for index in range(config.train.eval_batches):
                of = f", evaluation's batch {index + 1} of {config.train.eval_batches}"
                for micro in range(self._accumulation):
                    tokens, labels = self._micro_batch(batches, micro, self.step_count, of)
                    _, entropy = self.engine.deepspeed(tokens, labels)
                    loss += entropy.float()
        self.engine.deepspeed.train()
        mean_loss, self.votes = mean_and_votes(loss / (config.train.eval_batches * self._accumulation), ballot())
        return mean_loss

    def multipliers(self) -> dict[str, Tensor]:
        """All multipliers by "role/side", complete on global rank 0. Collective."""
        engine = self.engine
        found = trained(engine.model, engine.partition, engine.optimizer, kinds=("multiplier",))
        return by_role((item.role, item.side or "", item.tensor.cpu()) for item in found)

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def resume(self, info: CheckpointInfo) -> list[str]:
        """Go on after the step at which a checkpoint was saved, with the next sample of every source.

        Returns:
            Lines on the sources of data that a user should read.
        """
        self.close()
        self.step_count, self.samples, self.figures = info.step, info.samples, dict(info.figures)
        self.bad_steps = int(self.figures.get("bad_steps", 0))
        return [] if info.data is None else self._train.load_state_dict(info.data, info.samples)

    def run(self, run_dir: Path, checkpoints: RunCheckpoints, stop: StopRequests) -> str | None:
        """All remaining steps, with evaluation, records and checkpoints. Records are written by global rank 0.

        Returns:
            Why the run stopped before its last step; None: it is complete.

        Raises:
            CheckpointFailed: the last checkpoint could not be written; on every rank.
            Diverged: `train.max_bad_steps` in a row were bad; on every rank.
        """
        config = self.config
        peak = device.peak_flops(config.train.torch_dtype)
        multipliers = config.multipliers.implementation != "none"
        histograms = config.train.log_histograms_every if multipliers else 0
        main_rank = torch.distributed.get_rank() == 0
        reason, outcome = None, None
        skipped = self.engine.optimizer.skipped_steps
        unsaved = False
        with contextlib.ExitStack() as stack:
            # If training fails, the checkpoint that is being written shall be there all the same.
            stack.callback(checkpoints.wait, _LAST_SAVE_SECONDS)
            stack.callback(self.close)
            out = None
            if main_rank:
                out = stack.enter_context(Writers(run_dir, config.train.steps, self.step_count, skipped))
            while self.step_count < config.train.steps and reason is None:
                record = self.train_step(stop.ballot)
                bad = record["skipped_steps"] > skipped or not math.isfinite(record["loss"])
                skipped = int(record["skipped_steps"])
                self.bad_steps = self.bad_steps + 1 if bad else 0
                self.figures |= {key: record[key] for key in ("tokens", "loss")} | {"bad_steps": float(self.bad_steps)}
                extra = {"memory_bytes": float(device.memory_bytes())}
                if peak is not None:
                    world = torch.distributed.get_world_size()
                    extra["mfu"] = record["tokens_per_second"] * self._flops / (peak * world)
                self._progress.at(self.step_count, "records", ON_FILES)
                if out is not None:
                    out.step(record, extra)
                if config.train.max_bad_steps and self.bad_steps >= config.train.max_bad_steps:
                    raise Diverged(self.step_count, self.bad_steps, record)
                last = self.step_count == config.train.steps
                if multipliers and (last or (histograms and self.step_count % histograms == 0)):
                    self.last_multipliers = self.multipliers()
                    if out is not None and histograms:
                        out.histograms(self.last_multipliers, self.step_count)
                due = config.train.eval_every and self.step_count % config.train.eval_every == 0
                if self._valid is not None and (due or last):
                    self.figures["valid_loss"] = self.evaluate(stop.ballot)
                    if out is not None:
                        out.evaluation({"step": self.step_count, "valid_loss": self.figures["valid_loss"]})
                self._progress.at(self.step_count, "after the records")
                reason = None if last else stop.decided(self.votes)
                _report(out, checkpoints.poll())
                # Not while steps are bad: what is wrong may be in the weights already.
                unsaved |= checkpoints.due(self.step_count)
                if last or reason or (unsaved and not self.bad_steps):
                    unsaved = False
                    self._progress.at(self.step_count, "checkpoint", ON_FILES)
                    data, figures = self._train.state_dict(), dict(self.figures)
                    outcome = checkpoints.save(self.engine, self.step_count, self.samples, data, figures)
                    _report(out, outcome)
                    self._progress.at(self.step_count, "after the checkpoint")
            self._progress.at(self.step_count, "the last checkpoint's end", ON_FILES)
            awaited = checkpoints.wait()
            _report(out, awaited)
        outcome = awaited or outcome
        if outcome is not None and outcome.error is None:
            self.last_checkpoint = outcome.path
        elif outcome is not None and outcome.step == self.step_count:
            raise CheckpointFailed(outcome, reason)
        return reason


def mean_and_votes(value: Tensor, votes: Sequence[float] = ()) -> tuple[float, list[float]]:
    """The mean of an fp32 scalar over data-parallel ranks, and sums of `votes` over all ranks, in one collective.

    Tensor-parallel ranks hold the same value but vote each for itself, as a signal may reach only one of them. So all
    ranks take part, and of the value's replicas the first counts: zeros added to an fp32 sum change no bit.
    """
    packed = device.upload(torch.tensor([0.0, *votes], dtype=torch.float32))
    if mesh.tensor_group().rank() == 0:
        packed[0] = value
    torch.distributed.all_reduce(packed)
    total, *sums = packed.tolist()
    return total / mesh.data_group().size(), sums


_LAST_SAVE_SECONDS = 60.0
"""For which a run that fails waits for a checkpoint that is being written: other ranks may be gone."""


class Diverged(Exception):
    """Too many bad steps in a row."""

    def __init__(self, step: int, bad: int, record: dict[str, float]) -> None:
        self.last_good_step = step - bad
        super().__init__(
            f"the last {bad} steps, {step - bad + 1} to {step}, were bad (train.max_bad_steps): loss "
            f"{record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
        )


class CheckpointFailed(Exception):
    """A run's last checkpoint is not there."""

    def __init__(self, outcome: Outcome, reason: str | None) -> None:
        super().__init__(f"the checkpoint of step {outcome.step} could not be written ({outcome.error})")
        self.reason = reason
        """Why the run had stopped; None: it was complete."""


def _report(out: Writers | None, outcome: Outcome | None) -> None:
    """Say what became of a checkpoint, on the rank that writes."""
    if out is None or outcome is None:
        return
    if outcome.error is None:
        out.checkpoint(outcome.step, outcome.path, outcome.stall_seconds, outcome.seconds)
    else:
        out.say(f"warning: {outcome.path} could not be written ({outcome.error}); training goes on")
