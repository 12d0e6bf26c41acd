"""Coordinate check of muP: how far a few steps move activations, against the model's width.

    python examples/experiments/coord_check.py                      # AdamW
    python examples/experiments/coord_check.py --optimizer muon

A model of each width takes a few steps on the same random tokens, once with the settings of the base width as they are
(standard) and once with muP's factors (megamult/models/llama/mup.py). The table has, for each kind of activation, the
root mean square of its change since the start, and the slope of its logarithm over that of the width. Without muP
activations move further the wider the model. With muP they do not: slopes are near 0, or between -0.5 and 0 where much
of a change comes from initial weights. Source: Yang et al., arXiv 2203.03466,
appendix D.1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megamult.distributed import device, start
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.model import GPT
from megamult.models.llama.mup import Mup, mup
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.build import make_optimizer, update_norm
from megamult.optim.config import OptimizerConfig

VOCAB = 512
HEAD_SIZE = 32


def sizes(width: int) -> ModelConfig:
    """Return a model of this width; all of its widths are in proportion."""
    return ModelConfig(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=width // HEAD_SIZE,
        ffn_hidden_size=width * 11 // 4,
        seq_length=64,
    )


def changes(model_sizes: ModelConfig, factors: Mup, optimizer: OptimizerConfig, steps: int) -> dict[str, float]:
    """Return the root mean square of the change of each kind of activation over so many steps."""
    overrides = factors.overrides(model_sizes, optimizer, MultipliersConfig("none"))
    chosen = replace(optimizer, **overrides["optimizer"])
    multipliers = MultipliersConfig(**overrides.get("multipliers", {"placement": {}}))
    model = GPT(
        replace(model_sizes, **overrides["model"]),
        VOCAB,
        seed=1,
        placement=multipliers.placement,
        initial=multipliers.initial_values(),
    )
    model.to(device.local_device())
    trained = make_optimizer(model, chosen, multipliers)
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, VOCAB, (16, model_sizes.seq_length + 1), generator=generator).to(device.local_device())
    tokens, labels = text[:, :-1], text[:, 1:].contiguous()
    before = activations(model, tokens)
    for _ in range(steps):
        model(tokens, labels)[0].backward()
        trained.step()
        trained.zero_grad()
    after = activations(model, tokens)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@torch.no_grad()
def activations(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return activations of the last layer, of the embedding and of the head, in fp64."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).double()

        return hook

    last = model.decoder.layers[-1]
    modules = {
        "embedding": model.embedding,
        "attention output": last.self_attention,
        "MLP output": last.mlp,
        "logits": model.output_layer,
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    GPTModel.forward(model, tokens, None, None)
    for handle in handles:
        handle.remove()
    return found


def slope(widths: list[int], values: list[float]) -> float:
    """Return the least-squares slope of log(value) over log(width)."""
    x, y = [math.log(width) for width in widths], [math.log(value) for value in values]
    mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean[0]) * (b - mean[1]) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean[0]) ** 2 for a in x)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="the first is the base width"
    )
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate at the base width (default 4e-3)")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    start.initialize(tensor=1)
    optimizer = OptimizerConfig(name=arguments.optimizer, lr=arguments.lr, weight_decay=0.0, clip_grad_norm=0.0)
    base = sizes(arguments.widths[0])
    print(f"{'':<12}{'':<20}" + "".join(f"{width:>10}" for width in arguments.widths) + f"{'slope':>9}")
    for which in ("standard", "muP"):
        rows: dict[str, list[float]] = {}
        for width in arguments.widths:
            factors = mup(sizes(width), base, update_norm(optimizer)) if which == "muP" else Mup()
            for name, value in changes(sizes(width), factors, optimizer, arguments.steps).items():
                rows.setdefault(name, []).append(value)
        for name, values in rows.items():
            numbers = "".join(f"{value:>10.4f}" for value in values)
            print(f"{which:<12}{name:<20}{numbers}{slope(arguments.widths, values):>9.2f}", flush=True)
    start.destroy()


if __name__ == "__main__":
    main()
