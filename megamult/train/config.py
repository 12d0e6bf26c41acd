"""The section `train` of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from megamult.settings import fixed
from megamult.validation import not_negative, positive, require

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Torch dtypes by their names in a configuration."""


@dataclass
class BatchRamp:
    """Batch-size ramp-up: the batch grows from `start` to train.global_batch_size in equal increments, as with
    Megatron's --rampup-batch-size. `start`, `increment` and `samples` are given together or not at all."""

    start: int | None = None
    """Sequences in the batch of the first step; null: every step has train.global_batch_size."""
    increment: int | None = None
    """Sequences by which the batch grows each time."""
    samples: int | None = None
    """Number of sequences over which the batch grows. They are divided into equal shares, one for each increment, and
    the batch grows each time a share has been read. Later steps have train.global_batch_size."""
    lr_scaling: Literal["sqrt", "none"] = "sqrt"
    """sqrt: learning rates are multiplied by sqrt(batch / train.global_batch_size), except that of multipliers if
    multipliers.schedule is constant. none: they do not depend on the batch."""

    def __post_init__(self) -> None:
        sizes = self._sizes()
        missing = [f"train.batch_ramp.{key}" for key, value in sizes.items() if value is None]
        require(
            len(missing) in (0, len(sizes)),
            f"train.batch_ramp is given without {', '.join(missing)}: a ramp needs start, increment and samples; give "
            "all three, or none of them",
        )
        wrong = [
            f"train.batch_ramp.{key} is {value}" for key, value in sizes.items() if value is not None and value < 1
        ]
        require(not wrong, f"{', '.join(wrong)}: {'it' if len(wrong) == 1 else 'each'} must be positive")
        require(
            not missing or self.lr_scaling == "sqrt",
            f"train.batch_ramp.lr_scaling is {self.lr_scaling}, which has no effect without a ramp: leave it out, or "
            "give start, increment and samples",
        )

    def _sizes(self) -> dict[str, int | None]:
        return {"start": self.start, "increment": self.increment, "samples": self.samples}

    def increments(self, full: int) -> int:
        """Return how many times the batch grows until it has `full` sequences; 0 without a ramp."""
        if self.start is None or self.increment is None:
            return 0
        return (full - self.start) // self.increment

    def check_full(self, full: int) -> None:
        """Check that increments lead from `start` to exactly `full` sequences.

        Raises:
            ValueError: they do not.
        """
        if self.start is None or self.increment is None:
            return
        require(
            self.start < full,
            f"train.batch_ramp.start is {self.start}, and train.global_batch_size is {full}: the batch would never "
            "grow; lower start, or leave train.batch_ramp out",
        )
        require(
            (full - self.start) % self.increment == 0,
            f"train.batch_ramp.increment is {self.increment}: it must divide train.global_batch_size - "
            f"train.batch_ramp.start = {full} - {self.start} = {full - self.start}",
        )


@dataclass
class TrainConfig:
    """Length, batch, precision and outputs of the run."""

    steps: int = 100
    """Number of optimizer steps."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks. The number of micro-batches to accumulate follows from it."""
    batch_ramp: BatchRamp = field(default_factory=BatchRamp)
    """Batch-size ramp-up at the beginning of the run."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one data-parallel rank."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of parameters and activations. Master weights and optimizer state are fp32."""
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of accumulated gradients; auto means fp32. With train.dtype bf16, parallel.zero_stage 0 needs bf16 here."""
    recompute: Literal["none", "full"] = "none"
    """full: store only the input of each layer, and recompute the layer's other activations in backward. none: store
    all activations."""
    seed: int = fixed(1234, "samples", note="the data's order")
    """Seed of initial weights and data order."""
    run_dir: str | None = None
    """Directory for everything that the run writes. It must not contain another run. null: a new directory in runs/,
    named by the time."""
    eval_every: int = 0
    """Steps between evaluations on data.valid; 0: evaluate only at the end."""
    eval_batches: int | None = 8
    """Global batches per evaluation of a validation set. No sample is read twice: if the set has fewer samples, each of
    them is read once. null: all samples of the set."""
    log_histograms_every: int = 100
    """Steps between TensorBoard histograms of the multipliers; 0: none."""
    max_bad_steps: int = 20
    """Number of bad steps in a row after which the run ends with exit code 65 and names the last checkpoint before
    these steps; 0: never. In a bad step, the loss or a gradient is not finite, or the gradient norm is above
    optimizer.skip_grad_norm."""
    max_minutes: float | None = None
    """Minutes after which the run saves a checkpoint and ends with exit code 75. The run can then be started again.
    null: no limit."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch dtype of parameters and activations."""
        return _TORCH[self.dtype]

    @property
    def accumulation_dtype(self) -> str:
        """Dtype of accumulated gradients, fp32 or bf16."""
        return "fp32" if self.grad_accum_dtype == "auto" else self.grad_accum_dtype

    @property
    def torch_accumulation_dtype(self) -> torch.dtype:
        """Torch dtype of accumulated gradients."""
        return _TORCH[self.accumulation_dtype]

    def __post_init__(self) -> None:
        positive(
            "train",
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            eval_batches=1 if self.eval_batches is None else self.eval_batches,
        )
        not_negative(
            "train",
            seed=self.seed,
            eval_every=self.eval_every,
            log_histograms_every=self.log_histograms_every,
            max_bad_steps=self.max_bad_steps,
        )
        self.batch_ramp.check_full(self.global_batch_size)
        if self.max_minutes is not None:
            positive("train", max_minutes=self.max_minutes)
        require(self.seed < 2**63, f"train.seed is {self.seed}: it must be less than 2^63")
        require(
            self.run_dir is None or bool(self.run_dir.strip()), f"train.run_dir is {self.run_dir!r}: name a directory"
        )
        require(
            not (self.dtype == "fp32" and self.accumulation_dtype == "bf16"),
            "train.grad_accum_dtype is bf16 with train.dtype fp32: use auto or fp32",
        )
