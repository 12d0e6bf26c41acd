"""The one schema of every run: dataclasses with units, each validated; DESIGN names stay put.

Sizes are global (never per rank). A key that does not work yet is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megamult.multipliers.placement import resolve


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(section: str, **values: float) -> None:
    for key, value in values.items():
        _require(0 < value < math.inf, f"{section}.{key} is {value}: it must be positive and finite")


def _not_negative(section: str, **values: float) -> None:
    for key, value in values.items():
        _require(0 <= value < math.inf, f"{section}.{key} is {value}: it must be 0 or more, and finite")


@dataclass
class ModelConfig:
    """Sizes of the model."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 8
    """Query heads; their size is hidden_size / num_attention_heads."""
    num_query_groups: int | None = None
    """Key-value heads (grouped-query attention); null: one for each query head."""
    ffn_hidden_size: int = 704
    """Width of the gated MLP."""
    seq_length: int = 256
    """Tokens per sequence."""
    vocab_size: int | None = None
    """Exact vocabulary size; null: the tokenizer's. Padded internally to a multiple of 128."""
    rotary_base: float = 10000.0
    """Base period of the rotary embedding."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections: divided by sqrt(2 * num_layers)."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the LM head (without its multipliers)."""
    z_loss: float = 1e-4
    """Coefficient of log-sum-exp squared in the objective; 0: none."""

    @property
    def query_groups(self) -> int:
        """Key-value heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    def __post_init__(self) -> None:
        _positive(
            "model",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.query_groups,
            ffn_hidden_size=self.ffn_hidden_size,
            seq_length=self.seq_length,
            vocab_size=1 if self.vocab_size is None else self.vocab_size,
            rotary_base=self.rotary_base,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
        )
        _not_negative("model", z_loss=self.z_loss)
        heads, groups = self.num_attention_heads, self.query_groups
        _require(
            self.hidden_size % heads == 0 and self.hidden_size // heads % 2 == 0,
            f"model.hidden_size is {self.hidden_size} with model.num_attention_heads {heads}: a head's size must be "
            "a whole even number (rotary embedding); choose hidden_size a multiple of 2 * num_attention_heads",
        )
        _require(
            heads % groups == 0,
            f"model.num_query_groups is {groups}: it must divide model.num_attention_heads ({heads})",
        )


@dataclass
class MultipliersConfig:
    """Learnable multipliers (arXiv 2601.04890)."""

    implementation: Literal["none", "layer", "folded"] = "layer"
    """layer: explicit parameters in the layers; folded: in the optimizer, the model holds effective weights and pays
    nothing per micro-batch; none: a plain model."""
    placement: str | dict[str, str | list[str]] = "all"
    """all, symmetry_free, scalar (one per logical matrix), or a mapping from role to row, col, scalar or a list."""
    lr: float | None = None
    """Learning rate of the multipliers before schedule; null: optimizer.lr. Follows the same schedule."""
    weight_decay: float = 2e-3
    """Decoupled weight decay of the multipliers."""
    clip: bool = False
    """false: multipliers' gradients neither enter the norm nor are scaled; true: clipped by their own norm at
    optimizer.clip_grad_norm."""

    def __post_init__(self) -> None:
        resolve(self.placement)
        _not_negative("multipliers", weight_decay=self.weight_decay)
        if self.lr is not None:
            _positive("multipliers", lr=self.lr)


@dataclass
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer of the blocks' matrices; everything else is AdamW's."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, embedding and head."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 1.0
    """Threshold of the global gradient l2 norm over everything but the multipliers; 0: no clipping."""
    skip_grad_norm: float = 0.0
    """A step is skipped where the norm that clip_grad_norm looks at is above this, as it is where a gradient is not
    finite; 0: never."""
    momentum: float = 0.95
    """Muon's decay rate of the momentum (Nesterov)."""
    ns_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """Muon's Newton-Schulz polynomials, 5 steps."""
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Muon's Newton-Schulz computes in it. auto: fp32 if train.dtype is fp32, else bf16."""
    exchange_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Muon's momentum and updates travel between ranks in it. auto: fp32 if train.dtype is fp32, else bf16."""
    update_scale: Literal["match_rms_adamw", "spectral"] = "match_rms_adamw"
    """Muon's factor of an update. match_rms_adamw: 0.2 sqrt(max(out, in)), at which AdamW's lr and weight_decay carry
    over; spectral: sqrt(out / in)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Last steps of the run, over which the rate falls to min_lr; constant before."""
    decay: Literal["linear", "cosine", "exponential", "inverse_sqrt"] = "linear"
    """Shape of the fall over decay_steps."""
    min_lr: float = 0.0
    """Learning rate at the end of the fall (exponential and inverse_sqrt: must be positive)."""

    def __post_init__(self) -> None:
        _positive("optimizer", lr=self.lr, eps=self.eps)
        _not_negative(
            "optimizer",
            weight_decay=self.weight_decay,
            clip_grad_norm=self.clip_grad_norm,
            skip_grad_norm=self.skip_grad_norm,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            min_lr=self.min_lr,
        )
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: it must be in [0, 1)")
        for beta in self.betas:
            _require(0 <= beta < 1, f"optimizer.betas is {self.betas}: each must be in [0, 1)")
        _require(self.min_lr <= self.lr, f"optimizer.min_lr is {self.min_lr}, above optimizer.lr {self.lr}: lower it")
        _require(
            self.min_lr > 0 or self.decay_steps == 0 or self.decay not in ("exponential", "inverse_sqrt"),
            f"optimizer.min_lr is {self.min_lr} with optimizer.decay {self.decay}: it never reaches 0; set a "
            "positive min_lr",
        )


@dataclass
class ParallelConfig:
    """How the model is spread; data parallel = processes / tensor."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals sharded over the tensor-parallel ranks."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters. 1 keeps whole
    gradients and reduces them once per step, after the last backward pass. 2 reduces them in every micro-batch while
    backward runs: the same traffic with one micro-batch per step, more with several. Where memory allows 1 and short
    micro-batches do not hide the traffic of 2, 1 is faster (examples/benchmarks/zero_stages.py)."""
    tensor_across_nodes: bool = False
    """Let the ranks of a tensor-parallel group run on several nodes, with every layer's collectives on the network."""
    rendezvous_seconds: float = 45.0
    """Seconds within which all processes must have come together; a host that is down is named then."""
    timeout_minutes: float = 10.0
    """Minutes within which a run without any progress (a micro-batch, an evaluation, a part of start-up) is ended, with
    each rank's last step and stack. Of less than half a minute a third to a half is for asking them: no part of the run
    may take longer than the rest."""

    def __post_init__(self) -> None:
        _positive(
            "parallel",
            tensor=self.tensor,
            rendezvous_seconds=self.rendezvous_seconds,
            timeout_minutes=self.timeout_minutes,
        )
        _require(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage is {self.zero_stage}: use 0, 1, 2 or 3")


@dataclass
class DataConfig:
    """Corpora made by launch/prepare_data.py."""

    train: str | dict[str, float] | list[str] | None = None
    """Prefix of .bin and .idx, a list of prefixes (equal weights), or a mapping from prefix to weight."""
    valid: str | dict[str, float] | list[str] | None = None
    """The same for evaluation; null: no evaluation."""
    tokenizer: str | None = None
    """The sentencepiece model that the corpora were encoded with."""
    validate: Literal["stamp", "full"] = "stamp"
    """Check of the corpora at a start. stamp: sizes, headers and samples are compared with the stamp that
    launch/prepare_data.py wrote; full: every byte is read besides, by all processes together."""

    @staticmethod
    def sources(value: str | dict[str, float] | list[str] | None) -> list[tuple[str, float]]:
        """(prefix, weight) of each source."""
        if value is None:
            return []
        if isinstance(value, str):
            return [(value, 1.0)]
        if isinstance(value, dict):
            return list(value.items())
        return [(prefix, 1.0) for prefix in value]

    def __post_init__(self) -> None:
        for key, value in (("train", self.train), ("valid", self.valid)):
            for prefix, weight in self.sources(value):
                _require(weight > 0, f"data.{key} gives {prefix} the weight {weight}: it must be positive")


@dataclass
class TrainConfig:
    """The run."""

    steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 32
    """Sequences per optimizer step over all ranks; accumulation follows from it."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one data-parallel rank."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of parameters and activations; masters and optimizer state are fp32."""
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of accumulated gradients. auto: fp32. ZeRO 0 in bf16 can only do bf16: say so, or use ZeRO 1 to 3."""
    recompute: Literal["none", "full"] = "none"
    """full: keep each layer's input alone and recompute the rest in backward."""
    seed: int = 1234
    """Of weights and data order."""
    run_dir: str | None = None
    """Where everything that the run writes goes; must not hold another run. null: a new one, runs/ and the time."""
    eval_every: int = 0
    """Steps between evaluations on data.valid; 0: at the end alone."""
    eval_batches: int = 8
    """Global batches per evaluation."""
    log_histograms_every: int = 100
    """Steps between TensorBoard histograms of the multipliers; 0: none."""
    max_bad_steps: int = 20
    """Bad steps in a row (a gradient or loss that is not finite, or a norm above optimizer.skip_grad_norm) after which
    the run ends with exit code 65 and names the last checkpoint from before them; 0: never."""
    max_minutes: float | None = None
    """Minutes after which the run saves a checkpoint and ends with exit code 75, to be started again; null: none."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def accumulation_dtype(self) -> str:
        """fp32 or bf16."""
        return "fp32" if self.grad_accum_dtype == "auto" else self.grad_accum_dtype

    def __post_init__(self) -> None:
        _positive(
            "train",
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            eval_batches=self.eval_batches,
        )
        _not_negative(
            "train",
            seed=self.seed,
            eval_every=self.eval_every,
            log_histograms_every=self.log_histograms_every,
            max_bad_steps=self.max_bad_steps,
        )
        if self.max_minutes is not None:
            _positive("train", max_minutes=self.max_minutes)
        _require(self.seed < 2**63, f"train.seed is {self.seed}: it must be less than 2^63")
        _require(
            self.run_dir is None or bool(self.run_dir.strip()), f"train.run_dir is {self.run_dir!r}: name a directory"
        )
        _require(
            not (self.dtype == "fp32" and self.accumulation_dtype == "bf16"),
            "train.grad_accum_dtype is bf16 with train.dtype fp32: use auto or fp32",
        )


@dataclass
class CheckpointConfig:
    """Checkpoints, in the run directory's `checkpoints/step_N/`; any layout of processes can resume from them."""

    save_every: int = 0
    """Steps between checkpoints; 0: at the end alone."""
    keep: int = 2
    """How many of the newest to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept besides; 0: none."""
    asynchronous: bool = True
    """true: copy the state aside and write it while training goes on; false: write it at once, in less memory."""
    load: str | None = None
    """Where to go on from: a checkpoint's directory; or latest: the newest one of train.run_dir, if there is any (one
    that is damaged is reported, and the one before it taken). null: start anew."""
    reset_optimizer: bool = False
    """Take weights, multipliers and position from the checkpoint, and leave the optimizer's state."""

    def __post_init__(self) -> None:
        _not_negative("checkpoint", save_every=self.save_every, keep=self.keep, keep_every=self.keep_every)
        _require(
            self.load is None or bool(self.load.strip()),
            f"checkpoint.load is {self.load!r}: name a directory, or latest",
        )
        _require(
            self.load is not None or not self.reset_optimizer,
            "checkpoint.reset_optimizer is true and checkpoint.load is not set: give a checkpoint",
        )


@dataclass
class Config:
    """All of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: dict[str, Any] | str | None = None
    """Merged into the DeepSpeed configuration that the other keys produce; docs/deepspeed.md says what its keys do."""

    def __post_init__(self) -> None:
        optimizer, train = self.optimizer, self.train
        _require(
            optimizer.warmup_steps + optimizer.decay_steps <= train.steps,
            f"optimizer.warmup_steps {optimizer.warmup_steps} + optimizer.decay_steps {optimizer.decay_steps} "
            f"exceed train.steps {train.steps}: shorten them",
        )
        _require(
            not (train.dtype == "bf16" and self.parallel.zero_stage == 0 and train.accumulation_dtype == "fp32"),
            "parallel.zero_stage is 0 with train.dtype bf16: DeepSpeed accumulates gradients in bf16 there; use "
            "parallel.zero_stage 1 to 3, or accept it with train.grad_accum_dtype bf16",
        )
        _require(
            self.checkpoint.load != "latest" or train.run_dir is not None,
            "checkpoint.load is latest and train.run_dir is not set: name the run directory that holds the checkpoints",
        )
        tensor, model = self.parallel.tensor, self.model
        _require(
            not (
                self.multipliers.implementation == "folded"
                and model.tie_embeddings
                and resolve(self.multipliers.placement).get("embedding")
            ),
            "model.tie_embeddings is true with multipliers.implementation folded and multipliers.placement "
            f"{self.multipliers.placement!r}: the embedding's multipliers would reach the head too; set tie_embeddings "
            "to false, or placement to a mapping without embedding",
        )
        _require(
            not (self.parallel.sequence and tensor == 1),
            "parallel.sequence is true with parallel.tensor 1: sequences are sharded over tensor-parallel ranks; set "
            "it to false, or parallel.tensor above 1",
        )
        _require(
            train.eval_every == 0 or bool(DataConfig.sources(self.data.valid)),
            f"train.eval_every is {train.eval_every} and data.valid is not set: give a prefix, or set it to 0",
        )
        _require(
            not self.parallel.sequence or model.seq_length % tensor == 0,
            f"model.seq_length is {model.seq_length}: with parallel.sequence it must be a multiple of "
            f"parallel.tensor ({tensor})",
        )
        for key, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
        ):
            _require(
                size % tensor == 0,
                f"model.{key} is {size}: it must be a multiple of parallel.tensor ({tensor})",
            )
        groups = model.query_groups
        _require(
            groups % tensor == 0 or tensor % groups == 0,
            f"model.num_query_groups is {groups} and parallel.tensor {tensor}: one must divide the other",
        )
        _require(
            128 % tensor == 0,
            f"parallel.tensor is {tensor}: it must divide 128, the multiple that the vocabulary is padded to",
        )

    def check_world(self, processes: int) -> None:
        """Check what depends on the number of processes.

        Raises:
            ValueError: fact, value, remedy.
        """
        tensor, train = self.parallel.tensor, self.train
        _require(
            processes % tensor == 0,
            f"parallel.tensor is {tensor} and {processes} processes were started: start a multiple of {tensor}",
        )
        samples = train.micro_batch_size * (processes // tensor)
        _require(
            train.global_batch_size % samples == 0,
            f"train.global_batch_size is {train.global_batch_size}: it must be a multiple of "
            f"train.micro_batch_size x data parallel = {train.micro_batch_size} x {processes // tensor} = {samples}",
        )

    def accumulation(self, data_parallel: int) -> int:
        """Micro-batches per optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * data_parallel)

    def deepspeed_overrides(self) -> dict[str, Any]:
        """The user's part of the DeepSpeed configuration.

        Raises:
            ValueError: the file is missing or is no JSON object.
        """
        if self.deepspeed is None or isinstance(self.deepspeed, dict):
            return self.deepspeed or {}
        import json

        path = Path(self.deepspeed)
        _require(path.is_file(), f"deepspeed is {self.deepspeed!r}: there is no such file; give a path or a mapping")
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON file: {error}") from None
        _require(isinstance(loaded, dict), f"{path} holds no JSON object: give a mapping of DeepSpeed's keys")
        return loaded
