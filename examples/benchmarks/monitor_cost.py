"""Cost of the monitor: seconds of a step with and without its figures.

    python examples/benchmarks/monitor_cost.py
    python examples/benchmarks/monitor_cost.py --implementation folded --optimizer muon
    deepspeed --num_gpus 2 examples/benchmarks/monitor_cost.py --zero 2

One engine takes plain steps and monitored steps in turn. A monitored step includes the hooks, the copy of the weights,
the figures, and writing them to metrics.jsonl and TensorBoard. The difference of the medians, divided by monitor.every,
is what the monitor adds to a step. Default sizes are those of examples/configs/quickstart.yaml on a CPU, and of the
project's target on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.monitor.writers import Writers
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import build
from megamult.train.monitoring import RunMonitor


def run_config(arguments: argparse.Namespace, processes: int) -> Config:
    """Return the configuration of a run with the benchmark's sizes."""
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.heads,
            num_query_groups=arguments.groups,
            ffn_hidden_size=arguments.ffn,
            seq_length=arguments.seq,
        ),
        multipliers=MultipliersConfig(implementation=arguments.implementation),
        optimizer=OptimizerConfig(name=arguments.optimizer, lr=1e-4),
        parallel=ParallelConfig(zero_stage=arguments.zero),
        train=TrainConfig(
            global_batch_size=arguments.batch * arguments.accumulation * processes,
            micro_batch_size=arguments.batch,
            dtype=arguments.dtype,
            steps=1000,
        ),
    )


def batches(arguments: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the micro-batches of one step: random tokens and labels, [batch, seq]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(arguments.accumulation):
        text = torch.randint(0, arguments.vocab, (arguments.batch, arguments.seq + 1), generator=generator)
        yield text[:, :-1].contiguous().to(device.local_device()), text[:, 1:].contiguous().to(device.local_device())


def main() -> None:
    """Run the command line."""
    cuda = device.has_cuda()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024 if cuda else 192, help="model width")
    parser.add_argument("--heads", type=int, default=16 if cuda else 6, help="query heads")
    parser.add_argument("--groups", type=int, default=4 if cuda else 2, help="key-value heads")
    parser.add_argument("--ffn", type=int, default=2816 if cuda else 512, help="width of the gated MLP")
    parser.add_argument("--layers", type=int, default=24 if cuda else 4, help="transformer layers")
    parser.add_argument("--seq", type=int, default=2048 if cuda else 128, help="tokens per sequence")
    parser.add_argument("--vocab", type=int, default=32000 if cuda else 4096, help="vocabulary size")
    parser.add_argument("--batch", type=int, default=8 if cuda else 16, help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, default=4 if cuda else 1, help="micro-batches per step")
    parser.add_argument("--implementation", choices=("none", "layer", "folded"), default="layer", help="of multipliers")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "normuon"), default="adamw", help="optimizer.name")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if cuda else "fp32", help="train.dtype")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each kind")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before measuring")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    mesh = start.initialize(1)
    config = run_config(arguments, mesh.size)
    engine = build(config, arguments.vocab, mesh)
    monitor = RunMonitor(config, engine.model, engine.partition, engine.optimizer, arguments.vocab)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    count = 0
    with tempfile.TemporaryDirectory() as folder, Writers(Path(folder), 10**9) as writers:
        for step in range(1, arguments.warmup + arguments.steps + 1):
            for monitored in (False, True) if step % 2 else (True, False):
                mesh.barrier()
                began = time.perf_counter()
                if monitored:
                    monitor.begin()
                loss = engine.train_batch(batches(arguments), arguments.accumulation).item()
                if monitored:
                    figures = monitor.figures(step)
                    count = len(figures)
                    if mesh.rank == 0:
                        writers.figures(step, figures)
                assert loss == loss
                if step > arguments.warmup:
                    seconds[monitored].append(time.perf_counter() - began)
    if mesh.rank == 0:
        every = config.monitor.every
        plain, full = (statistics.median(seconds[monitored]) for monitored in (False, True))
        print(
            f"{engine.parameter_count:,} parameters, {arguments.layers} layers, {arguments.seq} x {arguments.batch} "
            f"tokens x {arguments.accumulation} micro-batches, {arguments.dtype}, {arguments.optimizer}, multipliers "
            f"{arguments.implementation}, ZeRO {arguments.zero}, {mesh.size} processes, "
            f"{device.local_device().type}, {count} figures, medians of {arguments.steps} steps of each kind in turn"
        )
        print(f"{'step':<14}{'seconds':>10}{'range/median':>14}")
        for name, monitored, median in (("plain", False, plain), ("monitored", True, full)):
            times = seconds[monitored]
            print(f"{name:<14}{median:>10.4f}{(max(times) - min(times)) / median:>14.3f}")
        print(f"added to a step at monitor.every {every}: {(full - plain) / every / plain:.4%} of {plain:.4f} s")
    start.destroy()


if __name__ == "__main__":
    main()
