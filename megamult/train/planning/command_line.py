"""Command line of `launch/plan.py`: a cluster's figures beside the keys of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from megamult.config import Config
from megamult.runtime import exit_codes
from megamult.train.planning.cluster import PRESETS, Cluster, cluster

_HELP = {
    "nodes": "number of nodes",
    "gpus_per_node": "GPUs, or processes on CPUs, of a node",
    "memory": "memory of a GPU in GB",
    "peak": "peak rate of a GPU in TFLOP/s, of dense products in bf16; needed on GPUs with train.dtype fp32",
    "within": "GB/s that a GPU sends to others of its node",
    "between": "GB/s that a GPU sends to other nodes",
    "efficiency": "share of the peak rate that a rank reaches while it computes",
    "reserve": "share of the memory that is left to CUDA, NCCL and what is not counted",
}


class _Parser(argparse.ArgumentParser):
    """Parser whose mistakes are those of a user like all others: one line, without a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all flags")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the cluster's figures. Values stay text, and a missing one is "", so that all mistakes can
    be told at once."""
    presets = "; ".join(f"{name}: {source}" for name, (_, source) in PRESETS.items())
    made = _Parser(
        prog="plan.py",
        description="Plan a run without starting it: memory per rank by kind, bytes on the wire, time of a step and "
        "MFU, for the sharding that the keys name and for the best of all that fit the cluster. Exit code 0: some "
        f"sharding fits; {exit_codes.DOES_NOT_FIT}: none does (with --no_search: the one that the keys name does not); "
        f"{exit_codes.USER_ERROR}: there are mistakes, all of them in one line.",
        epilog="All other arguments are keys of the run, as for launch/pretrain.py: --config FILE.yaml and "
        f"--section.key value; launch/pretrain.py --help lists them. Figures of devices: {presets}.",
        allow_abbrev=False,
    )
    words = f"{', '.join(PRESETS)} (default h100)"
    made.add_argument("--gpu", nargs="?", const="", default="h100", metavar="NAME", help=words)
    for field in fields(Cluster):
        if field.name in _HELP:
            words = f"{_HELP[field.name]} (default: of the device)"
            made.add_argument(f"--{field.name}", nargs="?", const="", metavar="NUMBER", help=words)
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
    if config is not None:
        more += _peak(config, given)
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
        is_what = f"is {given['gpu']!r}" if given["gpu"] else "has no value"
        found.append(f"--gpu {is_what}: use one of {', '.join(PRESETS)}, and give figures of your own")
    for field in fields(Cluster):
        text = given.get(field.name)
        if text is None:
            continue
        whole = isinstance(field.default, int)
        try:
            figures[field.name] = int(text) if whole else float(text)
        except ValueError:
            is_what = f"is {text!r}" if text else "has no value"
            found.append(f"--{field.name} {is_what}: give a {'whole ' if whole else ''}number")
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
        return None, [str(error), *_unknown(arguments)]
    found: list[str] = []
    if made is not None:
        tensor = config.parallel.tensor
        data = max(1, made.ranks // tensor)  # of ranks that do not divide: check_world tells
        for check in (lambda: config.check_world(made.ranks), lambda: deepspeed_config(config, data, made.cuda)):
            try:
                check()
            except ValueError as error:
                found.append(str(error))
        if made.gpus_per_node % tensor and not config.parallel.tensor_across_nodes:
            found.append(
                f"parallel.tensor is {tensor} and --gpus_per_node {made.gpus_per_node}: a tensor-parallel group would "
                "span nodes; use a divisor, or set parallel.tensor_across_nodes"
            )
    return config, found


def _unknown(arguments: list[str]) -> list[str]:
    """Return a message that names the cluster's flags, if an argument is a flag neither of these nor of the run."""
    from megamult.train.command_line import parser as run_parser

    keys = run_parser().get_defaults().keys()
    known = {key.partition(".")[0] for key in keys} | {"help", "print_config"}
    names = [each.partition("=")[0] for each in arguments if each.startswith("--")]
    wrong = [name for name in names if "." not in name and name.removeprefix("--") not in known]
    if not wrong:
        return []
    ours = ", ".join(f"--{name}" for name in ("gpu", *_HELP, "no_search"))
    return [f"{', '.join(wrong)} is none of the cluster's flags either: these are {ours}"]


def _peak(config: Config, given: argparse.Namespace) -> list[str]:
    """Return a message if the run computes in fp32, and the peak rate would be a GPU's in bf16."""
    preset = PRESETS.get(given.gpu)
    if config.train.dtype != "fp32" or given.peak is not None or preset is None or not cluster(given.gpu, {}).cuda:
        return []
    return [
        f"train.dtype is fp32, and {preset[0]['peak']:g} TFLOP/s is the peak rate of --gpu {given.gpu} in bf16: give "
        "its rate in fp32 as --peak, or set train.dtype bf16"
    ]


def _vocabulary(config: Config) -> tuple[int, list[str]]:
    """Return the vocabulary size, from the tokenizer where the keys do not give it, and the mistakes."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, []
    from megamult.train.corpora import vocabulary

    try:
        return vocabulary(config)[1], []
    except (ValueError, OSError) as error:
        return 0, [f"model.vocab_size is not set ({error}): give it, or data.tokenizer"]
