"""Newton-Schulz by itself: ours, its plain form in few lines of torch, and that of torch.optim.Muon, one process.

    python examples/benchmarks/newton_schulz.py --ns_dtype bf16

Whole optimizer steps: examples/benchmarks/muon_step.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turn


def newton_schulz_alone(arguments: argparse.Namespace) -> None:
    """Print the times of orthogonalizing all layers' matrices, for our Newton-Schulz and torch.optim.Muon's.

    The plain form is whole batched products by torch.bmm and torch.baddbmm, in the standard form. The method of ours is
    timed anew, and not taken from a file. Print also the share of the device's peak FLOP/s that ours reaches, and the
    times of symmetric products.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz as torchs

    from megamult.distributed import device
    from megamult.optim.muon.coefficients import SIMPLE, coefficients
    from megamult.optim.muon.newton_schulz import orthogonalize_by
    from megamult.optim.muon.symmetric import Products, has_kernel, kernel_suits, symmetric_product
    from megamult.optim.muon.timing import fastest, methods

    device.prepare()
    here, steps = device.local_device(), coefficients("simple", 5)
    kv = arguments.hidden // 64 if arguments.groups is None else arguments.groups
    shapes = {
        (arguments.hidden, arguments.hidden): 2,
        (kv * 64, arguments.hidden): 2,
        (arguments.ffn, arguments.hidden): 2,
        (arguments.hidden, arguments.ffn): 1,
    }
    # torch.optim.Muon computes in bf16, whatever the dtype of its input.
    ours = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.ns_dtype]
    peak = device.peak_flops(ours)
    print(
        f"only Newton-Schulz, {here.type}, ours in {arguments.ns_dtype}, torch's in bf16, "
        f"{torch.get_num_threads()} thread(s), medians of {arguments.steps} steps"
    )
    print(
        f"{'shape':<16}{'ours ms':>10}{'plain ms':>10}{'torch ms':>10}{'plain/ours':>12}{'torch/ours':>12}"
        f"{'of peak':>9}"
    )
    for (rows, cols), count in shapes.items():
        batch = torch.randn(count * arguments.layers, rows, cols, device=here)
        method = fastest((rows, cols), steps, methods((rows, cols), [ours], has_kernel(here)), here).method
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda batch=batch, method=method: orthogonalize_by(batch, steps, method),
            "plain": lambda batch=batch: plain_newton_schulz(batch.to(ours), SIMPLE, len(steps)),
            "torch": lambda batch=batch: [torchs(one, SIMPLE, 5, 1e-7) for one in batch],
        }
        mine, plain, theirs = medians(runs, arguments.warmup, arguments.steps)
        with FlopCounterMode(display=False) as counter:
            runs["ours"]()
        share = "" if peak is None else f"{counter.get_total_flops() / mine / peak:.2f}"
        shape = f"{len(batch)} x {rows} x {cols}"
        print(
            f"{shape:<16}{1e3 * mine:>10.2f}{1e3 * plain:>10.2f}{1e3 * theirs:>10.2f}{plain / mine:>12.2f}"
            f"{theirs / mine:>12.2f}{share:>9}  {method.form}, {method.products}, together: {method.together}"
        )
    print("only symmetric products X X^T: whole, by block rows, by the kernel")
    print(f"{'X':<16}{'whole ms':>10}{'rows ms':>10}{'kernel ms':>11}{'whole/rows':>12}{'whole/kernel':>14}")
    smalls: Counter[tuple[int, ...]] = Counter()
    for shape, count in shapes.items():
        smalls[tuple(sorted(shape))] += count
    for shape, count in smalls.items():
        x = torch.randn(count * arguments.layers, *shape, device=here).to(ours)
        out = torch.empty(len(x), shape[0], shape[0], dtype=ours, device=here)
        ways: list[Products] = ["whole", "block_rows"]
        if has_kernel(here) and kernel_suits(shape[0], shape[1], ours):
            ways.append("kernel")
        products = {way: partial(symmetric_product, x, x.mT, out, way) for way in ways}
        taken = medians(products, arguments.warmup, arguments.steps)
        name = f"{len(x)} x {shape[0]} x {shape[1]}"
        kernel = f"{1e3 * taken[2]:>11.3f}" if len(taken) > 2 else f"{'':>11}"
        ratio = f"{taken[0] / taken[2]:>14.2f}" if len(taken) > 2 else ""
        print(f"{name:<16}{1e3 * taken[0]:>10.3f}{1e3 * taken[1]:>10.3f}{kernel}{taken[0] / taken[1]:>12.2f}{ratio}")


def plain_newton_schulz(x: torch.Tensor, abc: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Return the orthogonalized matrices [batch, rows, cols], as few lines of torch compute them."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        r = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(r, r, r, beta=abc[1], alpha=abc[2]), x, beta=abc[0])
    return x.mT if tall else x


def medians(runs: Mapping[str, Callable[[], Any]], warmup: int, turns: int) -> list[float]:
    """Run functions in turn; return the median seconds of each."""
    return [statistics.median(seconds) for seconds in in_turn(runs, warmup, turns).values()]


def add_sizes(parser: argparse.ArgumentParser) -> bool:
    """Add the options with the sizes of the matrices, by default those of a model of a billion parameters on a GPU and
    of a small one on a CPU. Return whether it is a GPU."""
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    parser.add_argument("--hidden", type=int, default=2048 if cuda else 512, help="model width")
    parser.add_argument("--ffn", type=int, default=8192 if cuda else 1408, help="width of the gated MLP")
    parser.add_argument("--layers", type=int, default=16 if cuda else 4, help="transformer layers")
    parser.add_argument("--groups", type=int, default=8 if cuda else None, help="query groups; default: one per head")
    return cuda


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = add_sizes(parser)
    parser.add_argument(
        "--ns_dtype",
        choices=("fp32", "bf16", "fp16"),
        default="bf16" if cuda else "fp32",
        help="dtype of our Newton-Schulz",
    )
    parser.add_argument("--steps", type=int, default=9, help="measured calls of each")
    parser.add_argument("--warmup", type=int, default=1, help="calls of each before the measured ones")
    newton_schulz_alone(parser.parse_args())


if __name__ == "__main__":
    main()
