"""What benchmarks of whole training steps share: a run of the target's sizes, its data, and the table of its times."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig


def parser_of(doc: str | None, implementations: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the sizes of a run: the quickstart's on a CPU, those of the project's target on a GPU.

    Args:
        doc: docstring of the benchmark.
        implementations: implementations of multipliers that the benchmark can run.
    """
    cuda = device.has_cuda()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024 if cuda else 192, help="model width")
    parser.add_argument("--heads", type=int, default=16 if cuda else 6, help="query heads")
    parser.add_argument("--groups", type=int, default=4 if cuda else 2, help="key-value heads")
    parser.add_argument("--ffn", type=int, default=2816 if cuda else 512, help="width of the gated MLP")
    parser.add_argument("--layers", type=int, default=24 if cuda else 4, help="transformer layers")
    parser.add_argument("--seq", type=int, default=2048 if cuda else 128, help="tokens per sequence")
    parser.add_argument("--vocab", type=int, default=32000 if cuda else 4096, help="vocabulary size")
    parser.add_argument("--batch", type=int, default=8 if cuda else 16, help="sequences per micro-batch")
    parser.add_argument("--implementation", choices=implementations, default="layer", help="of multipliers")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "normuon"), default="adamw", help="optimizer.name")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if cuda else "fp32", help="train.dtype")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each kind")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before measuring")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def run_config(
    arguments: argparse.Namespace, processes: int, accumulation: int, qk_clip: float | None = None
) -> Config:
    """Return the configuration of a run with the benchmark's sizes.

    Args:
        arguments: what a parser of :func:`parser_of` has read.
        processes: number of data-parallel processes.
        accumulation: number of micro-batches per step.
        qk_clip: threshold of QK-clip, or None.
    """
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.heads,
            num_query_groups=arguments.groups,
            ffn_hidden_size=arguments.ffn,
            seq_length=arguments.seq,
        ),
        multipliers=MultipliersConfig(implementation=arguments.implementation, qk_clip=qk_clip),
        optimizer=OptimizerConfig(name=arguments.optimizer, lr=1e-4),
        parallel=ParallelConfig(zero_stage=arguments.zero),
        train=TrainConfig(
            global_batch_size=arguments.batch * accumulation * processes,
            micro_batch_size=arguments.batch,
            dtype=arguments.dtype,
            steps=1000,
        ),
    )


def batches(arguments: argparse.Namespace, accumulation: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the micro-batches of one step: random tokens and labels, [batch, seq]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(accumulation):
        text = torch.randint(0, arguments.vocab, (arguments.batch, arguments.seq + 1), generator=generator)
        yield text[:, :-1].contiguous().to(device.local_device()), text[:, 1:].contiguous().to(device.local_device())


def setting(arguments: argparse.Namespace, parameters: int, accumulation: int, processes: int, more: str = "") -> str:
    """Return the first line of a table: what was run."""
    return (
        f"{parameters:,} parameters, {arguments.layers} layers, {arguments.seq} x {arguments.batch} tokens x "
        f"{accumulation} micro-batches, {arguments.dtype}, {arguments.optimizer}, multipliers "
        f"{arguments.implementation}, ZeRO {arguments.zero}, {processes} processes, "
        f"{device.local_device().type}{more}, medians of {arguments.steps} steps of each kind in turn"
    )


def table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the median time of each kind of step and its range over the median, a line each."""
    lines = [f"{'step':<14}{'seconds':>10}{'range/median':>14}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"{name:<14}{median:>10.4f}{(max(times) - min(times)) / median:>14.3f}")
    return "\n".join(lines)
