"""Names of the monitor's figures: `weight_rms/q/layer_03` is a metric, a role (or another subject) and a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

_Value = TypeVar("_Value")


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a parameter belongs to, counted from 0, or None if it is in no layer.

    PyTorch names the modules of a list by their index. The index of the layer is the first part of the name that is a
    number: `decoder.layers.3.mlp.linear_fc2.weight` belongs to layer 3, `decoder.final_layernorm.weight` to none.
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def key(metric: str, subject: str | None = None, layer: int | None = None) -> str:
    """Return the name of a figure. A figure without a layer is about all layers."""
    return "/".join(filter(None, (metric, subject, None if layer is None else f"layer_{layer:02d}")))


def by_place(
    metric: str,
    values: Iterable[tuple[str | None, int | None, _Value]],
    join: Callable[[Sequence[_Value]], float],
) -> dict[str, float]:
    """Return the figures of one metric: for each subject and layer, and for each subject over all layers.

    Args:
        metric: name of the metric.
        values: (subject, layer, value) of each tensor; several tensors may have the same subject and layer.
        join: function from the values of several tensors to the figure of all of them.
    """
    found: dict[str, list[_Value]] = defaultdict(list)
    for subject, layer, value in values:
        found[key(metric, subject)].append(value)
        if layer is not None:
            found[key(metric, subject, layer)].append(value)
    return {name: join(members) for name, members in found.items()}


def mean(values: Sequence[float]) -> float:
    """Return the mean of some figures."""
    return sum(values) / len(values)
