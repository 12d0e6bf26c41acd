"""Construction of a DeepSpeed engine from a configuration: model, param groups, optimizer, partition."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from deepspeed.monitor.monitor import Monitor
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.logging import set_log_level_from_string
from pydantic import ValidationError
from torch import Tensor

from megamult.checkpoint import resume
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.checkpoint.state import owned
from megamult.config import Config
from megamult.distributed import device
from megamult.distributed.mesh import Mesh
from megamult.models.common.head_logits import HeadLogits
from megamult.optim.build import make_optimizer
from megamult.optim.clip import Norms
from megamult.optim.param_groups import set_lr_factor
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.parameters.stated import named_specs
from megamult.train.batches import MicroBatch, WeightedMicroBatch
from megamult.train.deepspeed_config import deepspeed_config
from megamult.train.engine import EngineState
from megamult.train.model import build_model
from megamult.zero.attach import attach
from megamult.zero.gather import Logical, trained
from megamult.zero.partition import Partition


@dataclass
class DeepSpeedEngine:
    """Implementation of :class:`megamult.train.engine.Engine` with DeepSpeed. DeepSpeed reduces gradients over
    ranks, and its ZeRO divides the training state over ranks."""

    deepspeed: Any
    model: torch.nn.Module
    optimizer: TwoPhaseOptimizer
    partition: Partition
    settings: Mapping[str, Any]
    """DeepSpeed configuration of the run."""

    @property
    def mesh(self) -> Mesh:
        """Mesh of the processes that the engine computes on."""
        return self.partition.mesh

    @property
    def parameter_count(self) -> int:
        """Number of logical parameters (without padding) of the whole model."""
        return sum(spec.numel_logical for _, _, spec in named_specs(self.model))

    @property
    def norms(self) -> Norms:
        """Norms of the last step's gradient."""
        assert self.optimizer.norms is not None
        return self.optimizer.norms

    @property
    def skipped_steps(self) -> int:
        """Number of steps so far that changed nothing."""
        return self.optimizer.skipped_steps

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step by param group, and of each role that has factors of its own."""
        return self.optimizer.learning_rates

    @property
    def further_figures(self) -> dict[str, float]:
        """Figures of QK-clip in the last step, by name; empty without QK-clip."""
        return {} if self.optimizer.qk_clip is None else self.optimizer.qk_clip.figures()

    def set_lr_factor(self, factor: float) -> None:
        """Set all learning rates to `factor` times their peaks, from the next step on.

        Those of multipliers stay at their peaks if `multipliers.schedule` is `constant`.
        """
        set_lr_factor(self.optimizer.param_groups, factor)

    @property
    def monitors(self) -> dict[str, Callable[[Mapping[str, float], int], None]]:
        """DeepSpeed's monitors that are enabled, by their sections. They are apart, so that one that fails keeps no
        other from its figures, as it would in DeepSpeed's monitor of all."""
        master = self.deepspeed.monitor
        made = {
            "tensorboard": master.tb_monitor,
            "csv_monitor": master.csv_monitor,
            "wandb": master.wandb_monitor,
            "comet": master.comet_monitor,
        }
        return {f"deepspeed.{name}": partial(_write_to, each) for name, each in made.items() if each is not None}

    def train_batch(self, micro_batches: Iterator[MicroBatch], accumulation: int) -> Tensor:
        """Take one optimizer step by the mean gradient of `accumulation` micro-batches, and return the mean cross
        entropy in nats."""
        self._accumulate(accumulation)
        loss, count = torch.zeros((), device=device.local_device()), 0
        for tokens, labels in micro_batches:
            count += 1
            # Tell DeepSpeed where the step ends. By default it ends a step when the number of all micro-batches so far
            # is a multiple of the present accumulation, which is wrong once the accumulation has changed.
            self.deepspeed.set_gradient_accumulation_boundary(count == accumulation)
            objective, entropy = self.deepspeed(tokens, labels)
            self.deepspeed.backward(objective)
            self.deepspeed.step()
            loss += entropy.float()
        assert count == accumulation, "the step has not ended"
        return loss / accumulation

    def _accumulate(self, accumulation: int) -> None:
        """Tell all parts of DeepSpeed how many micro-batches the next step has.

        The engine divides each loss by this number, so that the gradient is the mean over the step's batch.
        """
        engine = self.deepspeed
        engine.set_train_batch_size(accumulation * engine.train_micro_batch_size_per_gpu() * self.mesh.size_of("data"))
        # `set_train_batch_size` changes neither the batch size in the timer nor the accumulation in ZeRO's optimizers.
        engine.tput_timer.batch_size = engine.train_batch_size()
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = accumulation

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[WeightedMicroBatch]) -> Tensor:
        """Return the sum over all samples of weight x mean cross entropy in nats."""
        self.deepspeed.eval()
        loss = torch.zeros((), dtype=torch.float64, device=device.local_device())
        for tokens, labels, weights in micro_batches:
            _, entropy = self.deepspeed(tokens, labels, weights)
            loss += entropy
        self.deepspeed.train()
        return loss

    def multipliers(self) -> Iterator[Logical]:
        """Yield all multipliers. Their values are complete on global rank 0 only. All ranks iterate together."""
        return trained(self.model, self.partition, self.optimizer, kinds=("multiplier",))

    def state(self) -> EngineState:
        """Return the state to save."""
        chunks, optimizer = owned(self.partition, self.optimizer), self.optimizer
        choices = {kind: dict(rule.choices) for kind, rule in optimizer.rules.items() if rule.choices}
        return EngineState(chunks, optimizer.updates, optimizer.skipped_steps, choices)

    def restore(self, checkpoint: SavedCheckpoint, *, reset_optimizer: bool) -> None:
        """Load a checkpoint into model and optimizer (see :func:`megamult.checkpoint.resume.restore`)."""
        # DeepSpeed's own figures are over its count of sequences, which is not in our checkpoints.
        self.deepspeed.global_samples = checkpoint.info.samples
        resume.restore(checkpoint, self.partition, self.optimizer, reset_optimizer=reset_optimizer)


def _write_to(monitor: Monitor, figures: Mapping[str, float], samples: int) -> None:
    monitor.write_events([(name, value, samples) for name, value in figures.items()])


def check_deepspeed(config: Config, mesh: Mesh) -> None:
    """Check the DeepSpeed configuration, by our rules and by DeepSpeed's own, before anything is built.

    Raises:
        ValueError: the user's DeepSpeed keys are not valid.
    """
    settings = deepspeed_config(config, mesh.size_of("data"))
    if config.deepspeed:
        try:
            DeepSpeedConfig(settings, mpu=mesh.mpu)
        except ValidationError as error:
            each = "; ".join(
                f"{'.'.join(map(str, part['loc'])) or error.title}: {part['msg']}" for part in error.errors()
            )
            raise ValueError(f"deepspeed: DeepSpeed refuses these keys ({each}); correct or remove them") from None
        # DeepSpeedConfigError derives from Exception directly, and a wrong type can raise anything in its parser.
        except Exception as error:
            raise ValueError(f"deepspeed: DeepSpeed refuses a key ({error}); correct or remove it") from None


def build_optimizer(config: Config, model: torch.nn.Module, mesh: Mesh) -> TwoPhaseOptimizer:
    """Make the optimizer that `config` names, for all parameters of the model."""
    logits = None if config.multipliers.qk_clip is None else HeadLogits(model)
    return make_optimizer(model, config.optimizer, config.multipliers, mesh=mesh, logits=logits)


def build(
    config: Config,
    vocab_size: int,
    mesh: Mesh,
    *,
    draw: bool = True,
    eod: int | None = None,
    note: Callable[[str], None] = lambda doing: None,
    optimizer_of: Callable[[Config, torch.nn.Module, Mesh], TwoPhaseOptimizer] = build_optimizer,
    choices: Mapping[str, Any] = MappingProxyType({}),
) -> DeepSpeedEngine:
    """Build this rank's model, optimizer and engine.

    At ZeRO 3 the model is partitioned while it is constructed, so it may be larger than one device.

    Args:
        mesh: mesh of the processes.
        draw: whether to draw initial weights. If not, the weights that would be drawn are NaN until a checkpoint
            is loaded.
        eod: id of the token that ends a document. `data.document_mask` needs it.
        note: function that is called with a description of each part of the work. Building a large model takes minutes.
        optimizer_of: function that makes the optimizer from the configuration, the model and the mesh.
        choices: choices of the update rules in the checkpoint that the run goes on from, by kind of parameter.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    settings = deepspeed_config(config, mesh.size_of("data"))
    context: Any = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        context = deepspeed.zero.Init(
            # Without the group, zero.Init partitions over all ranks and overwrites tensor-parallel shards. The dtype
            # comes from the settings, because zero.Init ignores its argument `dtype` on devices without fp16 (CPUs).
            data_parallel_group=mesh.groups["data"],
            config_dict_or_path=settings,
            mpu=mesh.mpu,
        )
    with context:
        model = build_model(config, vocab_size, config.train.seed if draw else None, note, eod=eod)
    if config.parallel.zero_stage != 3:
        model.to(device.local_device())
    note("building the optimizer")
    optimizer = optimizer_of(config, model, mesh)
    for kind, rule in optimizer.rules.items():
        rule.choices = choices.get(kind, {})
    # DeepSpeed's BF16_Optimizer prints memory figures per group.
    with optimizer.paused(), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=mesh.mpu, dist_init_required=False
        )
    # The lines that steps_per_print asks for are of the level INFO.
    set_log_level_from_string("info" if settings["steps_per_print"] else "warning")
    note("checking the partition")
    partition = attach(engine, optimizer, mesh)
    if draw and partition.full_precision is not None:
        partition.full_precision.start_at(config.multipliers.initial_values())
    return DeepSpeedEngine(engine, model, optimizer, partition, settings)
