"""Configuration of a run: one section for each part of the program, and the checks that involve several sections.

Sizes are global, except train.micro_batch_size, which is per data-parallel rank. There are no keys for features that do
not work yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from megamult.checkpoint.config import CheckpointConfig
from megamult.data.config import DataConfig
from megamult.distributed.config import ParallelConfig
from megamult.models.common.config import DecoderConfig
from megamult.models.llama.config import ModelConfig
from megamult.monitor.config import MonitorConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.parameters.roles import ROLES, resolve
from megamult.train.config import TrainConfig
from megamult.validation import require

__all__ = ["SECTIONS", "Config", "ModelConfig"]


@dataclass
class Config:
    """Configuration of a run."""

    model: DecoderConfig = field(default_factory=ModelConfig)
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: dict[str, Any] | str | None = None
    """DeepSpeed configuration (a mapping, or the path of a JSON file) to merge into the one that the other keys
    produce. docs/deepspeed.md lists the keys of a DeepSpeed configuration. On the command line, its optimizer,
    scheduler and gradient_clipping are read as keys of the sections `optimizer` and `train`; here they must say the
    same."""

    def __post_init__(self) -> None:
        optimizer, train, roles = self.optimizer, self.train, self.model.roles
        of_roles = [
            *self.model.role_mistakes(),
            *self.multipliers.role_mistakes(roles),
            *optimizer.role_mistakes(roles),
        ]
        require(not of_roles, "; ".join(of_roles))
        spans = ("warmup_steps", "decay_steps", "final_steps")
        trial = " ".join(f"--optimizer.{key} 0" for key in spans if getattr(optimizer, key))
        require(
            optimizer.warmup_steps + optimizer.decay_steps + optimizer.final_steps <= train.steps,
            f"optimizer.warmup_steps {optimizer.warmup_steps} + optimizer.decay_steps {optimizer.decay_steps} + "
            f"optimizer.final_steps {optimizer.final_steps} exceed train.steps {train.steps}: shorten them (for a "
            f"trial of a few steps: {trial})",
        )
        require(
            not (train.dtype == "bf16" and self.parallel.zero_stage == 0 and train.accumulation_dtype == "fp32"),
            "parallel.zero_stage is 0 with train.dtype bf16: DeepSpeed then accumulates gradients in bf16; use "
            "parallel.zero_stage 1 to 3, or accept bf16 accumulation with train.grad_accum_dtype bf16",
        )
        require(
            self.checkpoint.load != "latest" or train.run_dir is not None,
            "checkpoint.load is latest and train.run_dir is not set: name the run directory that holds the checkpoints",
        )
        tensor, model, placement = self.parallel.tensor, self.model, resolve(self.multipliers.placement, roles)
        without = {role: sorted(sides) for role, sides in placement.items() if role != "embedding"}
        flow = ", ".join(f"{role}: [{', '.join(sides)}]" for role, sides in without.items())
        require(
            not (self.multipliers.implementation == "folded" and model.tie_embeddings and placement.get("embedding")),
            "model.tie_embeddings is true with multipliers.implementation folded and multipliers.placement "
            f"{self.multipliers.placement!r}: the embedding's multipliers would reach the head too; use the same "
            f"placement without the embedding, multipliers.placement {{{flow}}}, or implementation layer",
        )
        require(
            not (model.tie_embeddings and self.multipliers.divide_weights and "embedding" in self.multipliers.initial),
            "multipliers.initial.embedding is given with model.tie_embeddings and multipliers.divide_weights true: the "
            "head has the divided weights too, without the multipliers; set divide_weights to false, or leave "
            "multipliers.initial.embedding out",
        )
        of_head = [
            key
            for key, given in (
                ("multipliers.placement", self.multipliers.implementation != "none" and placement.get("head")),
                ("model.init_std_factors", "head" in model.init_std_factors),
                ("optimizer.lr_factors", "head" in optimizer.lr_factors),
                ("optimizer.weight_decay_factors", "head" in optimizer.weight_decay_factors),
            )
            if given
        ]
        require(
            not (model.tie_embeddings and of_head),
            f"model.tie_embeddings is true, so the head has no weight of its own, and {', '.join(of_head)} names the "
            "head: leave the head out of these keys, or set model.tie_embeddings to false",
        )
        of_fixed = [
            f"optimizer.weight_decay_factors.{role}"
            for role in optimizer.weight_decay_factors
            if self.multipliers.norm == "fixed" and ROLES[role].orthogonalized
        ]
        require(
            not of_fixed,
            f"multipliers.norm is fixed, and then {', '.join(of_fixed)} has no effect, because matrices of fixed norm "
            "have no weight decay: leave it out",
        )
        useless = [
            f"optimizer.lr_factors.{role} has no effect, because {why}"
            for role, why in model.unused_roles.items()
            if role in optimizer.lr_factors
        ]
        require(not useless, f"{'; '.join(useless)}: leave it out")
        require(
            self.multipliers.qk_clip is None or "q_k" not in model.broken_symmetries,
            f"multipliers.qk_clip is {self.multipliers.qk_clip} with model.qk_norm {str(model.qk_norm).lower()} and "
            f"model.attention_bias {model.attention_bias}: QK-clip scales the row multipliers of Q and K, which with "
            "QK-norm or a bias does not scale the attention logits; leave qk_clip out",
        )
        require(
            not (self.parallel.sequence and tensor == 1),
            "parallel.sequence is true with parallel.tensor 1: sequences are sharded over tensor-parallel ranks; set "
            "parallel.sequence to false, or parallel.tensor above 1",
        )
        require(
            train.eval_every == 0 or bool(self.data.validation_sets()),
            f"train.eval_every is {train.eval_every} and data.valid is not set: set data.valid, or "
            "set train.eval_every to 0",
        )
        self.multipliers.check_shared_columns([roles for roles in model.fused if set(roles) <= set(model.roles)])
        model.check_sharding(tensor, self.parallel.sequence)

    def check_world(self, processes: int) -> None:
        """Check the keys that must fit the number of processes.

        Raises:
            ValueError: a key does not fit the number of processes.
        """
        tensor, train = self.parallel.tensor, self.train
        require(
            processes % tensor == 0,
            f"parallel.tensor is {tensor} and {processes} processes were started: start a multiple of {tensor}",
        )
        samples = train.micro_batch_size * (processes // tensor)
        # If the first batch and the increment are multiples of `samples`, so is every batch of the ramp.
        sizes = {
            "train.global_batch_size": train.global_batch_size,
            "train.batch_ramp.start": train.batch_ramp.start or 0,
            "train.batch_ramp.increment": train.batch_ramp.increment or 0,
        }
        wrong = [f"{key} is {size}" for key, size in sizes.items() if size % samples]
        require(
            not wrong,
            f"{', '.join(wrong)}: {'it' if len(wrong) == 1 else 'each'} must be a multiple of "
            f"train.micro_batch_size x data parallel = {train.micro_batch_size} x {processes // tensor} = {samples}; "
            "change it, or lower train.micro_batch_size",
        )

    def accumulation(self, data_parallel: int, batch: int | None = None) -> int:
        """Return the number of micro-batches per optimizer step on each data-parallel rank.

        Args:
            data_parallel: number of data-parallel ranks.
            batch: number of sequences in the step's batch; train.global_batch_size if None.
        """
        batch = self.train.global_batch_size if batch is None else batch
        return batch // (self.train.micro_batch_size * data_parallel)

    def deepspeed_overrides(self) -> dict[str, Any]:
        """Return the keys that the user gave in `deepspeed` (a mapping or a file), or {} if `deepspeed` is not set.

        Raises:
            ValueError: the file is missing, or it does not contain a JSON object.
        """
        if self.deepspeed is None or isinstance(self.deepspeed, dict):
            return self.deepspeed or {}
        path = Path(self.deepspeed)
        require(path.is_file(), f"deepspeed is {self.deepspeed!r}: there is no such file; give a path or a mapping")
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"deepspeed is {self.deepspeed!r}, and this file is not JSON ({error}): give a JSON file with "
                "DeepSpeed's keys"
            ) from None
        require(
            isinstance(loaded, dict),
            f"deepspeed is {self.deepspeed!r}, and this file holds no JSON object: give a mapping of DeepSpeed's keys",
        )
        return loaded


SECTIONS: dict[str, Any] = {
    **{name: hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)},
    "model": ModelConfig,
}
"""Class of each section by the section's name, in the order of :class:`Config`. The class of `model` is that of the
default architecture; others are in :func:`megamult.models.architectures.model_class`."""
