"""Translation of DeepSpeed's keys for the optimizer, the schedule and clipping into megamult's keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from megamult.config import Config
from megamult.train.deepspeed_keys import KEYS, TRANSLATED

_OPTIMIZER = {
    "params.lr": "optimizer.lr",
    "params.betas": "optimizer.adamw.betas",
    "params.eps": "optimizer.adamw.eps",
    "params.weight_decay": "optimizer.weight_decay",
}
_WARMUP = {"params.warmup_num_steps": "optimizer.warmup_steps", "params.warmup_max_lr": "optimizer.lr"}
_CURVES = {"warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
"""Values of optimizer.decay by the schedules of DeepSpeed in which the learning rate falls."""
_OTHERS = {
    "warmup_max_lr": ("warmuplr", "warmupdecaylr"),
    "warmup_min_lr": ("warmuplr", "warmupdecaylr"),
    "warmup_min_ratio": ("warmupcosinelr",),
    "cos_min_ratio": ("warmupcosinelr",),
    "total_num_steps": tuple(_CURVES),
}
"""Parameters that only some schedules of DeepSpeed have, and these schedules."""
_GOVERNED = {
    "gradient_clipping": ("optimizer.clip_grad_norm",),
    "optimizer": ("optimizer.name", *_OPTIMIZER.values()),
    "scheduler": tuple(f"optimizer.{key}" for key in ("warmup_steps", "decay_steps", "decay", "min_lr")),
}
"""Keys of megamult's that each of DeepSpeed's top-level keys is about."""


@dataclass(frozen=True)
class Saying:
    """Key of DeepSpeed's and the key of megamult's that says the same."""

    name: str
    """DeepSpeed's key, with dots."""
    value: Any
    key: str
    """Megamult's key, with dots."""
    meant: Any
    """Value of megamult's key that `value` stands for."""


def sayings(file: Mapping[str, Any], present: Callable[[str], Any]) -> Iterator[Saying]:
    """Yield what DeepSpeed's keys say in megamult's keys. Keys whose value is not valid are left out.

    Args:
        file: DeepSpeed's configuration without "auto".
        present: function from a key of megamult's to its value. It is asked when the next saying is, so it may take
            earlier sayings into account.
    """
    given = _valid(file)

    def said(name: str, key: str, meant: Any) -> Saying:
        return Saying(name, given[name], key, meant)

    if "gradient_clipping" in given:
        yield said("gradient_clipping", "optimizer.clip_grad_norm", given["gradient_clipping"])
    if "optimizer.type" in given:
        yield said("optimizer.type", "optimizer.name", "adamw")
    for section, keys in (("optimizer", _OPTIMIZER), ("scheduler", _WARMUP)):
        for name, key in keys.items():
            value = given.get(f"{section}.{name}")
            if value is not None:
                yield said(f"{section}.{name}", key, int(value) if key.endswith("_steps") else value)
    total, least = "scheduler.params.total_num_steps", "scheduler.params.cos_min_ratio"
    curve = _CURVES.get(str(given.get("scheduler.type")).lower())
    if total in given and curve is not None:
        yield said(total, "train.steps", int(given[total]))
        # Not the number given: if it contradicts train.steps, one message about that is enough.
        decay_steps = max(0, present("train.steps") - present("optimizer.warmup_steps"))
        yield said(total, "optimizer.decay_steps", decay_steps)
        yield said(total, "optimizer.final_steps", 0)
        yield said("scheduler.type", "optimizer.decay", curve)
        if curve == "linear":
            yield said("scheduler.type", "optimizer.min_lr", 0.0)
    if least in given and curve == "cosine":
        yield said(least, "optimizer.min_lr", given[least] * present("optimizer.lr"))


def conflicts(file: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Yield a message for each of DeepSpeed's keys that says something else than the run's own keys, or that leaves out
    what it needs."""

    def present(key: str) -> Any:
        return reduce(getattr, key.split("."), config)

    for each in sayings(file, present):
        value = present(each.key)
        if not _same(value, each.meant):
            yield (
                f"deepspeed.{each.name} is {each.value!r}, which means {each.key} {_shown(each.meant)}, and this run "
                f"has {_shown(value)}: change one of them, or remove deepspeed.{each.name}"
            )
    section = file.get("scheduler")
    params = section.get("params") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(params, dict):
        return
    kind = str(section.get("type", "")).lower()
    if kind not in map(str.lower, KEYS["scheduler.type"].values):
        if "type" not in section:
            yield "deepspeed.scheduler.type is not set: give it, or remove scheduler"
        return
    if params.get("warmup_num_steps", 0) and "warmup_type" not in params:
        yield (
            "deepspeed.scheduler.params.warmup_type is not set, and DeepSpeed's default is log: the warm-up is linear "
            "in every run; set it to linear, or remove warmup_num_steps"
        )
    for name, kinds in _OTHERS.items():
        if name in params and kind not in kinds:
            yield f"deepspeed.scheduler.params.{name} is set, and {section['type']} does not have it: remove it"


def adopted(file: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Translate DeepSpeed's keys, and return the values of those of megamult's keys that the user did not give.

    Args:
        file: the user's DeepSpeed configuration, without the entries that are "auto".
        given: megamult's keys that the user gave, and their values, by dotted name.
        defaults: values of keys that are not given, by dotted name.
    """
    found: dict[str, Any] = {}

    def present(key: str) -> Any:
        return next(each[key] for each in (found, given, defaults) if key in each)

    for each in sayings(file, present):
        if each.key not in given:
            found.setdefault(each.key, each.meant)
    return found


def echo(file: Mapping[str, Any], config: Config) -> str | None:
    """Return a line that says how the DeepSpeed keys optimizer, scheduler and gradient_clipping were read.

    It also says which of megamult's values apply where these keys leave something out. It is None if `file`, the user's
    DeepSpeed configuration, has none of them."""
    names = [name for name in TRANSLATED if name in file]
    if not names:
        return None

    def present(key: str) -> Any:
        return reduce(getattr, key.split("."), config)

    said = {each.key: None for each in sayings(file, present)}
    rest = [key for name in names for key in _GOVERNED[name] if key not in said]
    parts = [", ".join(f"{key} {_shown(present(key))}" for key in dict.fromkeys(keys)) for keys in (said, rest)]
    line = f"{', '.join(f'deepspeed.{name}' for name in names)}: read as {parts[0] or 'no value of its own'}"
    return f"{line}; they leave out: {parts[1]}" if parts[1] else line


def _valid(file: Mapping[str, Any]) -> dict[str, Any]:
    """Return the translated keys of `file` that have a valid value, by dotted name."""
    found = {}
    for name, key in KEYS.items():
        if key.use != "translated":
            continue
        value: Any = file
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and key.wanted(value) is None:
            found[name] = value
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, list | tuple) else str(value)
