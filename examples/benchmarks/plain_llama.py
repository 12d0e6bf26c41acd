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
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from engine_runs import batches, run_config
from torch import Tensor
from turns import in_turn

from megamult.config import Config
from megamult.distributed import device, start
from megamult.train.deepspeed_engine import build

SIZES = {
    "2M": {"layers": 4, "hidden": 192, "heads": 6, "groups": 2, "ffn": 512, "seq": 128},
    "15M": {"layers": 8, "hidden": 384, "heads": 6, "groups": 2, "ffn": 1152, "seq": 256},
    "60M": {"layers": 14, "hidden": 640, "heads": 10, "groups": 2, "ffn": 1728, "seq": 512},
}
"""Models by their parameters without those of embedding and head, rounded."""
VOCABULARY = 4096


def plain(config: Config, ranks: int) -> Callable[[Tensor, Tensor], float]:
    """Return a function that takes one optimizer step of the plain model, and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, optimizer = config.model, config.optimizer
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
    adamw = torch.optim.AdamW(model.parameters(), lr=optimizer.lr, betas=(0.9, 0.95), fused=True)
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)

    def step(tokens: Tensor, labels: Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.train.dtype == "bf16"):
            logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad_norm)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


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
        run = argparse.Namespace(**{**vars(arguments), **SIZES[name]}, vocab=VOCABULARY, optimizer="adamw")
        configs = {}
        for run.implementation in ("none", "layer", "folded"):
            config = run_config(run, ranks, accumulation=1)
            configs[run.implementation] = replace(config, model=replace(config.model, z_loss=0.0))  # plain has none
        ((tokens, labels),) = batches(run, 1)
        steps: dict[str, Callable[[], float]] = {"plain": partial(plain(configs["none"], ranks), tokens, labels)}
        for each, config in configs.items():
            engine = build(config, VOCABULARY, mesh)
            steps[each] = lambda engine=engine, pair=(tokens, labels): engine.train_batch(iter([pair]), 1).item()
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
