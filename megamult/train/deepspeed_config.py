"""DeepSpeed configuration of a run: made from the run's keys, then merged with the DeepSpeed keys of the user."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megamult.config import Config
from megamult.distributed import device
from megamult.train.deepspeed_keys import KEYS, SECTIONS, TRANSLATED
from megamult.train.deepspeed_translation import conflicts

_BUCKET_ELEMENTS = 50_000_000
"""Elements of a ZeRO communication bucket: 100 MB in bf16, enough to fill a link, and small compared with a model."""


def deepspeed_config(config: Config, data_parallel: int, cuda: bool | None = None) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run over `data_parallel` ranks, with the user's DeepSpeed keys merged in.

    Args:
        config: configuration of the run.
        data_parallel: number of data-parallel ranks.
        cuda: whether the run computes on CUDA GPUs; None: whether this process does.

    Raises:
        ValueError: the file cannot be read; or some of the user's keys are unknown to DeepSpeed, have no effect here,
            would change results, or contradict the run's own keys. The message names all of these.
    """
    cuda = device.has_cuda() if cuda is None else cuda
    produced, overrides = _produced(config, data_parallel, cuda), without_auto(config.deepspeed_overrides())
    problems = [
        *_problems(overrides, produced),
        *conflicts(overrides, config),
        *_without_effect(overrides, config),
        *_twice(overrides, config),
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return _overlaid(produced, {key: value for key, value in overrides.items() if key not in TRANSLATED})


def without_translated(overrides: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return `overrides` without the keys that say what the run's own keys say too. If some of these keys are wrong,
    return `overrides` as they are, so that :func:`deepspeed_config` names the mistakes beside all others."""
    asked = without_auto({key: value for key, value in overrides.items() if key in TRANSLATED})
    if [*_problems(asked, {}), *conflicts(asked, config)]:
        return overrides
    return {key: value for key, value in overrides.items() if key not in TRANSLATED}


def without_monitors(config: Config) -> Config:
    """Return the configuration without DeepSpeed's own monitors, which make folders or connections when it starts."""
    overrides = {key: value for key, value in config.deepspeed_overrides().items() if key not in _MONITORS}
    return dataclasses.replace(config, deepspeed=overrides or None)


_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")


def _is_bf16_optimizer(config: Config) -> bool:
    """Return whether DeepSpeed wraps the optimizer in its BF16_Optimizer.

    DeepSpeed does so at ZeRO 1 if the model is bf16 and gradients are accumulated in fp32. The run's own keys decide
    this alone: no DeepSpeed key that the user may set changes the choice.
    """
    train = config.train
    return config.parallel.zero_stage == 1 and train.dtype == "bf16" and train.accumulation_dtype == "fp32"


def _produced(config: Config, data_parallel: int, cuda: bool) -> dict[str, Any]:
    """Return the DeepSpeed configuration that follows from the run's own keys, without those that the user gave."""
    stage, train = config.parallel.zero_stage, config.train
    bf16, accumulation = train.dtype == "bf16", train.accumulation_dtype
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            "contiguous_gradients": True,
            # Overlap waits for the device even if there is no other rank to reduce with, so turn it off in that case.
            "overlap_comm": cuda and data_parallel > 1,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
        }
    if stage in (1, 2):
        zero["allgather_bucket_size"] = _BUCKET_ELEMENTS
        # Our optimizer computes the norm and skips bad steps, so DeepSpeed's own norm is not needed. It can be turned
        # off except in BF16_Optimizer.
        zero["compute_grad_norm"] = _is_bf16_optimizer(config)
        # With reduce_scatter, DeepSpeed divides gradients by the number of ranks before it casts them to the dtype in
        # which they are sent, so the division is in the model's dtype. Nor does reduce_scatter save traffic: a bucket
        # whose gradients belong to several ranks is all-reduced in any case.
        zero["reduce_scatter"] = not bf16
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(data_parallel),
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        # Add each gradient to its fp32 sum as soon as backward has computed it, not after the whole backward pass.
        "bf16": {"enabled": bf16} | ({"check_grad_overflow": False, "immediate_grad_update": True} if bf16 else {}),
        "data_types": {"grad_accum_dtype": accumulation},
        # DeepSpeed's default is the model's dtype, which would round sums over ranks to bf16.
        "communication_data_type": accumulation,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # DeepSpeed's throughput timer would wait for the device in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def without_auto(overrides: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `overrides` without the keys that ask for nothing.

    These are keys with the value "auto" or null (which mean megamult's value), keys that megamult would refuse but
    whose value switches them off, and mappings that become empty when such keys are removed. `path` is the dotted
    prefix of the keys."""
    kept = {}
    for key, value in overrides.items():
        name = f"{path}{key}"
        if value is None or value == "auto" or (name in KEYS and KEYS[name].use == "refused" and KEYS[name].off(value)):
            continue
        if isinstance(value, dict) and value:
            value = without_auto(value, f"{name}.")
            if not value:
                continue
        kept[key] = value
    return kept


def _problems(overrides: Mapping[str, Any], produced: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield a message for each mistake in the user's keys.

    Args:
        overrides: keys of the user's DeepSpeed configuration, or of one section in it.
        produced: the same section of the DeepSpeed configuration that megamult makes from the run's other settings.
        path: dotted prefix of the keys.
    """
    for key, value in overrides.items():
        name, ours = f"{path}{key}", produced.get(key)
        if name in KEYS:
            yield from _problem(name, value, ours)
        elif name not in SECTIONS:
            depth = name.count(".")
            near = [each for each in (*KEYS, *SECTIONS) if each.startswith(path) and each.count(".") == depth]
            yield _unknown(name, near)
        elif isinstance(value, dict):
            yield from _problems(value, ours or {}, f"{name}.")
        else:
            yield f"deepspeed.{name} is {value!r}: give a mapping of the section's keys"


def _problem(name: str, value: Any, ours: Any) -> Iterator[str]:
    """Yield a message for each mistake in one key. `ours` is the key's value in the configuration made from the run's
    keys, or None if that configuration leaves the key to DeepSpeed."""
    key = KEYS[name]
    shown = repr(value) if len(repr(value)) < 80 else "set"
    if key.use == "refused":
        if isinstance(value, dict) and key.switch in value:
            name, shown = f"{name}.{key.switch}", repr(value[key.switch])
        yield f"deepspeed.{name} is {shown}: {key.text}; remove it"
    elif key.use == "decided" and ours is not None and value != ours:
        yield f"deepspeed.{name} is {shown}, and this run needs {ours!r}: {key.text}; remove it"
    elif wanted := key.wanted(value):
        yield f"deepspeed.{name} is {shown}: {key.text}; {wanted}, or remove it"
    elif key.keys and not isinstance(value, dict):
        yield f"deepspeed.{name} is {shown}: give a mapping of the section's keys"
    elif isinstance(value, dict):
        yield from (
            _unknown(f"{name}.{each}", [f"{name}.{known}" for known in key.keys])
            for each in value
            if each not in key.keys
        )
        if key.package and value.get("enabled") and importlib.util.find_spec(key.package) is None:
            yield (
                f"deepspeed.{name} is enabled and the package {key.package} is not installed: pip install "
                f"{key.package}, or remove it"
            )


_OF_BUCKETS = {
    *("overlap_comm", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    "parameter_alignment",
}
"""Keys of `zero_optimization` that DeepSpeed's BF16_Optimizer ignores."""
_OF_GATHERS = {"allgather_bucket_size"}
"""Those that it ignores where megamult gathers parameters in its place (:mod:`megamult.zero.bf16`)."""


def _without_effect(overrides: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Yield a message for each of the user's keys that has no effect in this run, and would have one in other runs.

    At ZeRO 0 these are all keys of `zero_optimization` but `stage`. With DeepSpeed's BF16_Optimizer these are the keys
    in `_OF_BUCKETS`. Keys that belong to another stage (such as stage3_...) have no effect either, but are accepted,
    because one file may serve several stages. DeepSpeed's timer prints nothing without `steps_per_print`.
    """
    zero, timers = overrides.get("zero_optimization"), overrides.get("timers")
    names = {name for name in zero if name != "stage"} if isinstance(zero, dict) else set()
    where, remedy = "at parallel.zero_stage 0", "raise parallel.zero_stage"
    if config.parallel.zero_stage:
        ours = overrides.get("communication_data_type") in (None, config.train.accumulation_dtype)
        ignored = _OF_BUCKETS | (_OF_GATHERS if ours else set())
        names &= ignored if _is_bf16_optimizer(config) else set()
        where = (
            "at parallel.zero_stage 1 in bf16, where gradients are reduced and parameters gathered once, after the "
            "last backward pass"
        )
        remedy = "use parallel.zero_stage 2"
    for name in sorted(names):
        yield f"deepspeed.zero_optimization.{name} has no effect {where}: {remedy}, or remove it"
    timer = timers.get("throughput") if isinstance(timers, dict) else None
    if isinstance(timer, dict) and timer.get("enabled") and not overrides.get("steps_per_print"):
        yield (
            "deepspeed.timers.throughput is enabled, and prints nothing without steps_per_print: give it too, or "
            "remove the timer"
        )


def _twice(overrides: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Yield a message if DeepSpeed and megamult would both write to Weights & Biases, where a process has one run."""
    theirs, project = overrides.get("wandb"), config.monitor.wandb.project
    if isinstance(theirs, dict) and theirs.get("enabled") and project is not None:
        yield (
            f"deepspeed.wandb is enabled and monitor.wandb.project is {project!r}, so every figure would be in one run "
            "twice, over sequences and over steps: remove one of the two"
        )


def _unknown(name: str, known: Sequence[str]) -> str:
    section, _, last = name.rpartition(".")
    near = difflib.get_close_matches(last, [each.rpartition(".")[2] for each in known], n=1, cutoff=0.8)
    meant = ".".join(filter(None, (section, *near)))
    return f"deepspeed.{name} is not a DeepSpeed key: " + (f"did you mean {meant}" if near else "remove it")


def _overlaid(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(ours.get(key), dict) and isinstance(value, dict)
        result[key] = _overlaid(ours[key], value) if both else value
    return result
