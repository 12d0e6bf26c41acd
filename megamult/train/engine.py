"""A configuration becomes a DeepSpeed engine: model, param groups, optimizer, partition."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from megamult.config import Config
from megamult.distributed import device, mesh
from megamult.models.llama.model import GPT
from megamult.optim.build import make_optimizer
from megamult.optim.two_phase import TwoPhaseOptimizer
from megamult.train.deepspeed_config import deepspeed_config
from megamult.zero.attach import attach
from megamult.zero.partition import Partition


@dataclass
class Engine:
    """What the loop drives."""

    deepspeed: Any
    model: GPT
    optimizer: TwoPhaseOptimizer
    partition: Partition


def check_deepspeed(config: Config, mpu: mesh.ModelParallelUnit) -> None:
    """Let our rules and DeepSpeed's own look at the DeepSpeed configuration before anything is built.

    Raises:
        ValueError: the user's part of it is not possible.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    settings = deepspeed_config(config, mesh.data_group().size())
    if config.deepspeed:
        try:
            DeepSpeedConfig(settings, mpu=mpu)
        except ValidationError as error:
            each = "; ".join(
                f"{'.'.join(map(str, part['loc'])) or error.title}: {part['msg']}" for part in error.errors()
            )
            raise ValueError(f"deepspeed: DeepSpeed refuses it ({each}); correct or remove that") from None
        # DeepSpeedConfigError is an Exception of its own; wrong types surface as whatever its parser trips over.
        except Exception as error:
            raise ValueError(f"deepspeed: DeepSpeed refuses it ({error}); correct or remove that key") from None


def build(
    config: Config,
    vocab_size: int,
    mpu: mesh.ModelParallelUnit,
    *,
    draw: bool = True,
    note: Callable[[str], None] = lambda doing: None,
) -> Engine:
    """Model, optimizer and engine for this rank.

    At ZeRO 3 the model is partitioned while it is constructed, so it may be larger than one device.

    Args:
        draw: initial weights; False: they are NaN until a checkpoint is loaded.
        note: told what is being done, as the model of a large run takes minutes.
    """
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    settings = deepspeed_config(config, mesh.data_group().size())
    context: Any = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        context = deepspeed.zero.Init(
            # Without the group, zero.Init partitions over the world and overwrites tensor-parallel shards. It takes
            # the dtype from the settings; its argument `dtype` is not heeded where fp16 is unsupported (CPUs).
            data_parallel_group=mesh.data_group(),
            config_dict_or_path=settings,
            mpu=mpu,
        )
    with context:
        model = GPT(config, vocab_size, config.train.seed if draw else None, note)
    if config.parallel.zero_stage != 3:
        model.to(device.local_device())
    note("building the optimizer")
    optimizer = build_optimizer(config, model)
    # DeepSpeed warns of every optimizer that is not its own, and its bf16 wrapper prints memory figures per group.
    deepspeed_logger.setLevel(logging.ERROR)
    with optimizer.paused(), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    deepspeed_logger.setLevel(logging.WARNING)
    note("checking the partition")
    return Engine(engine, model, optimizer, attach(engine, optimizer))


def build_optimizer(config: Config, model: torch.nn.Module) -> TwoPhaseOptimizer:
    """The optimizer that `config` names, over all parameters of the model."""
    return make_optimizer(model, config.optimizer, config.multipliers)


def parameter_count(model: torch.nn.Module) -> int:
    """Logical parameters (no padding) of the whole model."""
    from megamult.parameters.spec import named_specs

    return sum(spec.numel_logical for _, _, spec in named_specs(model))
