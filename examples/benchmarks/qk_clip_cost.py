"""Cost of QK-clip: seconds of a step with `multipliers.qk_clip` over those without.

    python examples/benchmarks/qk_clip_cost.py
    python examples/benchmarks/qk_clip_cost.py --seq 1024 --batch 2
    deepspeed --num_gpus 2 examples/benchmarks/qk_clip_cost.py --implementation folded

Two engines of the same model take steps in turn. One measures the attention logits of every micro-batch and clips; the
other does not. Default sizes are those of examples/configs/quickstart.yaml on a CPU, and of the project's target on a
GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import build


def run_config(arguments: argparse.Namespace, processes: int, threshold: float | None) -> Config:
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
        multipliers=MultipliersConfig(implementation=arguments.implementation, qk_clip=threshold),
        optimizer=OptimizerConfig(name=arguments.optimizer, lr=1e-4),
        parallel=ParallelConfig(zero_stage=arguments.zero),
        train=TrainConfig(
            global_batch_size=arguments.batch * processes,
            micro_batch_size=arguments.batch,
            dtype=arguments.dtype,
            steps=1000,
        ),
    )


def batch(arguments: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the one micro-batch of a step: random tokens and labels, [batch, seq]."""
    generator = torch.Generator().manual_seed(0)
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
    parser.add_argument("--implementation", choices=("layer", "folded"), default="layer", help="of multipliers")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "normuon"), default="adamw", help="optimizer.name")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if cuda else "fp32", help="train.dtype")
    parser.add_argument("--threshold", type=float, default=0.01, help="multipliers.qk_clip; the default clips heads")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each kind")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before measuring")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    mesh = start.initialize(1)
    engines = {
        clipped: build(
            run_config(arguments, mesh.size, arguments.threshold if clipped else None), arguments.vocab, mesh
        )
        for clipped in (False, True)
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for step in range(arguments.warmup + arguments.steps):
        for clipped in (False, True) if step % 2 else (True, False):
            mesh.barrier()
            began = time.perf_counter()
            loss = engines[clipped].train_batch(batch(arguments), 1).item()
            figures = engines[clipped].further_figures
            assert loss == loss and (not clipped or step > 0 or figures["qk_clip_heads"] > 0)
            if step >= arguments.warmup:
                seconds[clipped].append(time.perf_counter() - began)
    if mesh.rank == 0:
        plain, full = (statistics.median(seconds[clipped]) for clipped in (False, True))
        ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
        print(
            f"{engines[True].parameter_count:,} parameters, {arguments.layers} layers, {arguments.seq} x "
            f"{arguments.batch} tokens, {arguments.dtype}, {arguments.optimizer}, multipliers "
            f"{arguments.implementation}, ZeRO {arguments.zero}, {mesh.size} processes, "
            f"{device.local_device().type}, medians of {arguments.steps} steps of each kind in turn"
        )
        print(f"{'step':<10}{'seconds':>10}{'range/median':>14}")
        for name, clipped, median in (("plain", False, plain), ("QK-clip", True, full)):
            times = seconds[clipped]
            print(f"{name:<10}{median:>10.4f}{(max(times) - min(times)) / median:>14.3f}")
        print(f"median of the ratios of neighbouring steps: {ratio:.4f}")
    start.destroy()


if __name__ == "__main__":
    main()
