"""Command line of `launch/plan.py`: a cluster's figures beside the keys of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megamult.config import Config
from megamult.train.planning.cluster import PRESETS, Cluster, cluster

_HELP = {
    "nodes": "number of nodes",
    "gpus_per_node": "GPUs, or processes on CPUs, of a node",
    "memory": "memory of a GPU in GB",
    "peak": "peak rate of a GPU in TFLOP/s, of dense bf16 products",
    "within": "GB/s that a GPU sends to others of its node",
    "between": "GB/s that a GPU sends to other nodes",
    "efficiency": "share of the peak rate that a rank reaches while it computes",
    "reserve": "share of the memory that is left to CUDA, NCCL and what is not counted",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the cluster's figures. Values stay text, so that all mistakes can be told at once."""
    presets = "; ".join(f"{name}: {source}" for name, (_, source) in PRESETS.items())
    made = argparse.ArgumentParser(
        prog="plan.py",
        description="Plan a run without starting it: memory per rank by kind, bytes on the wire, time of a step and "
        "MFU, for the sharding that the keys name and for the best of all that fit the cluster.",
        epilog="All other arguments are keys of the run, as for launch/pretrain.py: --config FILE.yaml and "
        f"--section.key value; launch/pretrain.py --help lists them. Figures of devices: {presets}.",
        allow_abbrev=False,
    )
    made.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(PRESETS)} (default h100)")
    for field in fields(Cluster):
        if field.name in _HELP:
            made.add_argument(f"--{field.name}", metavar="NUMBER", help=f"{_HELP[field.name]} (default: of the device)")
    made.add_argument("--no_search", action="store_true", help="estimate only the sharding that the keys name")
    return made


def asked_for(arguments: Sequence[str] | None) -> tuple[Config, int, Cluster, str, bool]:
    """Return the run's configuration, its vocabulary size, the cluster, the source of its figures, whether to search.

    Raises:
        ValueError: there are mistakes in the cluster's figures or in the run's keys; the message has all of them.
    """
    given, rest = parser().parse_known_args(list(sys.argv[1:] if arguments is None else arguments))
    made, found = _cluster(vars(given))
    config, more = _config(rest, None if found else made)
    if found or config is None:
        raise ValueError("; ".join([*found, *more]))
    vocab_size, unknown = _vocabulary(config)
    if more or unknown:
        raise ValueError("; ".join([*more, *unknown]))
    return config, vocab_size, made, PRESETS[given.gpu][1], not given.no_search


def _cluster(given: dict[str, Any]) -> tuple[Cluster, list[str]]:
    """Return the cluster, and the mistakes in its figures."""
    found, figures = [], {}
    if given["gpu"] not in PRESETS:
        found.append(f"--gpu is {given['gpu']!r}: use one of {', '.join(PRESETS)}, and give figures of your own")
    for field in fields(Cluster):
        text = given.get(field.name)
        if text is None:
            continue
        whole = isinstance(field.default, int)
        try:
            figures[field.name] = int(text) if whole else float(text)
        except ValueError:
            found.append(f"--{field.name} is {text!r}: give a {'whole ' if whole else ''}number")
    made = cluster(given["gpu"] if given["gpu"] in PRESETS else "h100", figures)
    return made, [*found, *made.mistakes()]


def _config(arguments: list[str], made: Cluster | None) -> tuple[Config | None, list[str]]:
    """Return the configuration, or None if it has a mistake, and the mistakes in it and in how it fits the cluster, if
    there is one."""
    from megamult.train.command_line import parse
    from megamult.train.deepspeed_config import deepspeed_config

    try:
        config, _ = parse(arguments)
    except (ValueError, OSError) as error:
        return None, [str(error)]
    found = []
    if made is not None:
        tensor = config.parallel.tensor
        try:
            config.check_world(made.ranks)
            deepspeed_config(config, made.ranks // tensor, made.cuda)
        except ValueError as error:
            found.append(str(error))
        if made.gpus_per_node % tensor and not config.parallel.tensor_across_nodes:
            found.append(
                f"parallel.tensor is {tensor} and --gpus_per_node {made.gpus_per_node}: a tensor-parallel group would "
                "span nodes; use a divisor, or set parallel.tensor_across_nodes"
            )
    return config, found


def _vocabulary(config: Config) -> tuple[int, list[str]]:
    """Return the vocabulary size, from the tokenizer where the keys do not give it, and the mistakes."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, []
    from megamult.train.corpora import vocabulary

    try:
        return vocabulary(config)[1], []
    except (ValueError, OSError) as error:
        return 0, [f"model.vocab_size is not set ({error}): give it, or data.tokenizer"]
