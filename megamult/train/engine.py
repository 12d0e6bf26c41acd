"""A configuration becomes a DeepSpeed engine: model, param groups, optimizer, partition."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from megamult import device, parallel
from megamult.config import Config
from megamult.model.gpt import GPT
from megamult.optim.adamw import TwoPhaseAdamW
from megamult.optim.build import make_optimizer
from megamult.zero.attach import attach
from megamult.zero.slices import Partition

_BUCKET_ELEMENTS = 50_000_000
"""Elements of a ZeRO communication bucket: 100 MB in bf16, enough to fill a link, little beside a model."""


@dataclass
class Engine:
    """What the loop drives."""

    deepspeed: Any
    model: GPT
    optimizer: TwoPhaseAdamW
    partition: Partition


def deepspeed_config(config: Config, data_parallel: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, with the user's part merged in.

    Raises:
        ValueError: the user's part sets what a key of ours decides, to something else.
    """
    stage, train = config.parallel.zero_stage, config.train
    bf16 = train.dtype == "bf16"
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "contiguous_gradients": True,
            # It waits for the device, also where there is nobody to reduce with.
            "overlap_comm": device.has_cuda() and data_parallel > 1,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
        }
    if stage in (1, 2):
        zero["allgather_bucket_size"] = _BUCKET_ELEMENTS
        # Our optimizer takes the norm and skips bad steps; DeepSpeed need not do so again where it can be told.
        zero["compute_grad_norm"] = bf16 and stage == 1 and train.accumulation_dtype == "fp32"
    produced: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(data_parallel),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16} | ({"check_grad_overflow": False} if bf16 else {}),
        "data_types": {"grad_accum_dtype": train.accumulation_dtype},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    overrides = config.deepspeed_overrides()
    for key in ("optimizer", "scheduler", "fp16", "torch_autocast"):
        if key in overrides:
            raise ValueError(
                f"deepspeed.{key} is set: megamult decides it (optimizer.*, train.dtype); remove it from deepspeed"
            )
    merged = _merged(produced, overrides, "deepspeed")
    # Unless asked for: it waits for the device in every micro-batch.
    merged.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    for key in ("offload_optimizer", "offload_param"):
        section = merged["zero_optimization"].get(key) or {"device": "none"}
        device_name = section.get("device", "none") if isinstance(section, dict) else section
        if device_name != "none":
            raise ValueError(
                f"deepspeed.zero_optimization.{key}.device is {device_name!r}: megamult clips gradients on the device "
                "that computes them; remove it"
            )
    return merged


def check_deepspeed(config: Config, mpu: parallel.ModelParallelUnit) -> None:
    """Let our rules and DeepSpeed's own look at the DeepSpeed configuration before anything is built.

    Raises:
        ValueError: the user's part of it is not possible.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = deepspeed_config(config, parallel.data_group().size())
    if config.deepspeed:
        try:
            DeepSpeedConfig(settings, mpu=mpu)
        # DeepSpeedConfigError is an Exception of its own; wrong types surface as whatever its parser trips over.
        except Exception as error:
            raise ValueError(f"deepspeed: DeepSpeed refuses it ({error}); correct or remove that key") from None


def _merged(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        where = f"{path}.{key}"
        if key not in ours:
            result[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            result[key] = _merged(ours[key], value, where)
        elif ours[key] != value and key not in _TUNABLE:
            raise ValueError(
                f"{where} is {value!r}, and megamult's own keys make it {ours[key]!r}: remove it, or change the key "
                "that decides it (parallel.zero_stage, train.*, optimizer.clip_grad_norm)"
            )
        else:
            result[key] = value
    return result


_TUNABLE = {"overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "steps_per_print", "wall_clock_breakdown"}
"""Keys that we give a default, and that change no result."""


def build(config: Config, vocab_size: int, mpu: parallel.ModelParallelUnit) -> Engine:
    """Model, optimizer and engine for this rank.

    At ZeRO 3 the model is partitioned while it is constructed, so it may be larger than one device.
    """
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    settings = deepspeed_config(config, parallel.data_group().size())
    context: Any = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        context = deepspeed.zero.Init(
            # Without the group, zero.Init partitions over the world and overwrites tensor-parallel shards. It takes
            # the dtype from the settings; its argument `dtype` is not heeded where fp16 is unsupported (CPUs).
            data_parallel_group=parallel.data_group(),
            config_dict_or_path=settings,
            mpu=mpu,
        )
    with context:
        model = GPT(config, vocab_size, config.train.seed)
    if config.parallel.zero_stage != 3:
        model.to(device.local_device())
    optimizer = build_optimizer(config, model)
    # DeepSpeed warns of every optimizer that is not its own, and its bf16 wrapper prints memory figures per group.
    deepspeed_logger.setLevel(logging.ERROR)
    with optimizer.paused(), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    deepspeed_logger.setLevel(logging.WARNING)
    return Engine(engine, model, optimizer, attach(engine, optimizer))


def build_optimizer(config: Config, model: torch.nn.Module) -> TwoPhaseAdamW:
    """The optimizer that `config` names, over all parameters of the model."""
    return make_optimizer(model, config.optimizer, config.multipliers)


def parameter_count(model: torch.nn.Module) -> int:
    """Logical parameters (no padding) of the whole model."""
    from megamult.layout import named_layouts

    return sum(layout.numel_logical for _, _, layout in named_layouts(model))
