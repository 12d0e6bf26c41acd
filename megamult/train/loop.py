"""The training loop: batches in, steps, evaluation, figures out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megamult import device, parallel
from megamult.checkpoint.logical import trained
from megamult.config import Config
from megamult.monitor.statistics import by_role, flops_per_token
from megamult.monitor.writers import Writers
from megamult.optim.schedule import lr_factor
from megamult.train.engine import Engine


class Samples(Protocol):
    """Sample i of a run: a function of i alone, whatever the layout (:class:`megamult.data.BlendedDataset`)."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens` and `labels`, [seq] each."""

    def prepare(self, first: int, last: int, barrier: Callable[[], None]) -> None:
        """Make samples [first, last) ready; all ranks call it together."""


class Trainer:
    """Drives an engine over a run. Every rank calls every method together."""

    def __init__(self, config: Config, engine: Engine, train: Samples, valid: Samples | None, vocab_size: int) -> None:
        self.config, self.engine = config, engine
        self._train, self._valid = train, valid
        self._data_rank = parallel.data_group().rank()
        self._accumulation = config.accumulation(parallel.data_group().size())
        self._flops = flops_per_token(config.model, vocab_size)
        self.step_count = 0
        self.last_valid_loss: float | None = None

    def _micro_batch(self, samples: Samples, first: int, micro: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels, [micro batch, seq] each: this rank's part of the global batch that begins at `first`."""
        size = self.config.train.micro_batch_size
        start = first + (micro * parallel.data_group().size() + self._data_rank) * size
        rows = [samples[i] for i in range(start, start + size)]
        here = device.local_device()
        return (
            torch.stack([row["tokens"] for row in rows]).to(here),
            torch.stack([row["labels"] for row in rows]).to(here),
        )

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the step's record."""
        began = time.perf_counter()
        config, step = self.config, self.step_count
        batch = config.train.global_batch_size
        self._train.prepare(step * batch, (step + 1) * batch, torch.distributed.barrier)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, config.train.steps, config.optimizer)
        loss = torch.zeros((), device=device.local_device())
        for micro in range(self._accumulation):
            tokens, labels = self._micro_batch(self._train, step * batch, micro)
            objective, entropy = self.engine.deepspeed(tokens, labels)
            self.engine.deepspeed.backward(objective)
            self.engine.deepspeed.step()
            loss += entropy.float()
        self.step_count += 1
        norms = self.engine.optimizer.norms
        assert norms is not None
        mean_loss = self._mean(loss / self._accumulation)
        seconds = time.perf_counter() - began
        tokens_per_step = batch * config.model.seq_length
        return {
            "step": self.step_count,
            "loss": mean_loss,
            "lr": config.optimizer.lr * lr_factor(step, config.train.steps, config.optimizer),
            "grad_norm": norms.main,
            "multiplier_grad_norm": norms.multipliers,
            "tokens": self.step_count * tokens_per_step,
            "tokens_per_second": tokens_per_step / seconds,
            "seconds": seconds,
            "skipped_steps": self.engine.optimizer.skipped_steps,
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross entropy in nats over the first `train.eval_batches` global batches of data.valid."""
        assert self._valid is not None
        config = self.config
        batch = config.train.global_batch_size
        self._valid.prepare(0, config.train.eval_batches * batch, torch.distributed.barrier)
        self.engine.deepspeed.eval()
        loss = torch.zeros((), device=device.local_device())
        for index in range(config.train.eval_batches):
            for micro in range(self._accumulation):
                _, entropy = self.engine.deepspeed(*self._micro_batch(self._valid, index * batch, micro))
                loss += entropy.float()
        self.engine.deepspeed.train()
        return self._mean(loss / (config.train.eval_batches * self._accumulation))

    def _mean(self, value: Tensor) -> float:
        """Mean over data-parallel ranks (tensor-parallel ranks agree)."""
        torch.distributed.all_reduce(value, group=parallel.data_group())
        return value.item() / parallel.data_group().size()

    def multipliers(self) -> dict[str, Tensor]:
        """All multipliers by "role/side", complete on global rank 0. Collective."""
        engine = self.engine
        found = trained(engine.model, engine.partition, engine.optimizer, kinds=("multiplier",))
        return by_role((item.role, item.side or "", item.tensor.cpu()) for item in found)

    def run(self, run_dir: Path) -> None:
        """All remaining steps, with evaluation and records. Files are written by global rank 0."""
        config = self.config
        peak = device.peak_flops(config.train.torch_dtype)
        histograms = config.train.log_histograms_every if config.multipliers.implementation != "none" else 0
        main_rank = torch.distributed.get_rank() == 0
        with Writers(run_dir, config.train.steps) if main_rank else contextlib.nullcontext() as writers:
            while self.step_count < config.train.steps:
                record = self.train_step()
                extra = {"memory_bytes": float(device.memory_bytes())}
                if peak is not None:
                    world = torch.distributed.get_world_size()
                    extra["mfu"] = record["tokens_per_second"] * self._flops / (peak * world)
                if writers is not None:
                    writers.step(record, extra)
                last = self.step_count == config.train.steps
                if histograms and (self.step_count % histograms == 0 or last):
                    values = self.multipliers()
                    if writers is not None:
                        writers.histograms(values, self.step_count)
                due = config.train.eval_every and self.step_count % config.train.eval_every == 0
                if self._valid is not None and (due or last):
                    self.last_valid_loss = self.evaluate()
                    if writers is not None:
                        writers.evaluation({"step": self.step_count, "valid_loss": self.last_valid_loss})
