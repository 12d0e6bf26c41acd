"""Time of a training step over that of the same Llama written in plain PyTorch.

    python examples/benchmarks/plain_llama.py                                  # one process
    deepspeed --num_gpus 2 examples/benchmarks/plain_llama.py --sizes 2M 15M   # DP 2 beside DistributedDataParallel

Plain is transformers' LlamaForCausalLM with scaled_dot_product_attention, fused torch.optim.AdamW, clip_grad_norm_, and
with two processes DistributedDataParallel. Ours is the engine of a run, without multipliers and with them in the layers
and folded. All have the same sizes, batch, clipping and fp32 master weights: in bf16, plain has fp32 weights under
autocast. Each is a whole optimizer step of one micro-batch. They take steps in turn, and the one that goes first
rotates. A ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from engine_runs import batches
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.distributed.mesh import Mesh
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import build


def _sizes(layers: int, hidden: int, heads: int, groups: int, ffn: int, seq: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        seq_length=seq,
        z_loss=0.0,
    )


SIZES = {
    "2M": _sizes(4, 192, 6, 2, 512, 128),
    "15M": _sizes(8, 384, 6, 2, 1152, 256),
    "60M": _sizes(14, 640, 10, 2, 1728, 512),
}
"""Models by their parameters without those of embedding and head, rounded."""
VOCABULARY = 4096
LR, CLIP = 1e-4, 1.0


def plain(sizes: ModelConfig, dtype: str, mesh: Mesh) -> Callable[[Tensor, Tensor], float]:
    """Return a function that takes one optimizer step of the plain model, and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: torch.nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_query_groups,
            max_position_embeddings=sizes.seq_length,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device.local_device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)
    if mesh.size_of("data") > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)

    def step(tokens: Tensor, labels: Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(
    sizes: ModelConfig, implementation: str, dtype: str, zero: int, batch: int, mesh: Mesh
) -> Callable[[Tensor, Tensor], float]:
    """Return a function that takes one optimizer step of a run's engine, and returns its loss."""
    config = Config(
        model=sizes,
        multipliers=MultipliersConfig(implementation),
        optimizer=OptimizerConfig(lr=LR, clip_grad_norm=CLIP),
        parallel=ParallelConfig(zero_stage=zero),
        train=TrainConfig(
            global_batch_size=batch * mesh.size_of("data"), micro_batch_size=batch, dtype=dtype, steps=1000
        ),
    )
    engine = build(config, VOCABULARY, mesh)
    return lambda tokens, labels: engine.train_batch(iter([(tokens, labels)]), 1).item()


def in_turn(steps: dict[str, Callable[[], float]], warmup: int, repeat: int) -> dict[str, list[float]]:
    """Return the times in seconds of each step, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warmup + repeat):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if torch.distributed.get_world_size() > 1:
                torch.distributed.barrier()
            began = time.perf_counter()
            steps[name]()
            if device.has_cuda():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="models (default: all)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of ours (1)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch and process (8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before measuring (2)")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each (9)")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    mesh = start.initialize(1)
    ranks = mesh.size_of("data")
    if torch.distributed.get_rank() == 0:
        print(
            f"{device.local_device().type}, {arguments.dtype}, {ranks} processes of {torch.get_num_threads()} threads, "
            f"ZeRO {arguments.zero}, {arguments.batch} sequences, medians of {arguments.steps} steps in turn"
        )
        print(f"{'model':<6}{'step of':<14}{'seconds':>10}{'range/median':>14}{'over plain':>12}{'over none':>11}")
    for name in arguments.sizes:
        sizes = SIZES[name]
        made = {"plain": plain(sizes, arguments.dtype, mesh)}
        for each in ("none", "layer", "folded"):
            made[each] = ours(sizes, each, arguments.dtype, arguments.zero, arguments.batch, mesh)
        arguments.seq, arguments.vocab = sizes.seq_length, VOCABULARY
        ((tokens, labels),) = batches(arguments, 1)
        steps = {each: partial(step, tokens, labels) for each, step in made.items()}
        times = in_turn(steps, arguments.warmup, arguments.steps)
        if torch.distributed.get_rank() == 0:
            for each, own in times.items():
                median = statistics.median(own)
                over = [
                    statistics.median(a / b for a, b in zip(own, times[base], strict=True))
                    for base in ("plain", "none")
                ]
                spread = (max(own) - min(own)) / median
                print(f"{name:<6}{each:<14}{median:>10.4f}{spread:>14.3f}{over[0]:>12.3f}{over[1]:>11.3f}", flush=True)
    start.destroy()


if __name__ == "__main__":
    main()
