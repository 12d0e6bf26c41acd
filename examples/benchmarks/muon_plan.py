"""How DistributedMuon would spread Llama-3's matrices over up to 1,024 ranks, planned by one process on one core.

    python examples/benchmarks/muon_plan.py

The load of a rank is its number of Newton-Schulz FLOPs per optimizer step. `bound` is a lower bound of the busiest
rank's load in any assignment of whole matrices. If `busiest/mean` is far above `bound/mean`, another assignment might
do better. If `bound/mean` itself is far above 1, splitting one matrix over several ranks would pay.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megamult.optim.muon.newton_schulz import flops
from megamult.optim.muon.plan import lower_bound, make_plan
from megamult.parameters import megatron
from megamult.parameters.axes import Grid
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Cut, even_intervals, flat_intervals


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama 3 model (A. Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, table 3)."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int

    def specs(self) -> list[ParameterSpec]:
        """Return the specs of the matrices of all blocks."""
        block = [
            megatron.fused_qkv(self.heads, self.groups, self.hidden // self.heads, self.hidden),
            megatron.single_matrix("attention_out", self.hidden, self.hidden, 1),
            megatron.fused_gate_up(self.ffn, self.hidden),
            megatron.single_matrix("down", self.hidden, self.ffn, 1),
        ]
        return block * self.layers


LLAMA = {"8B": Llama(32, 4096, 32, 8, 14336), "70B": Llama(80, 8192, 64, 8, 28672)}


def zero_cuts(specs: Sequence[ParameterSpec], tensor: int, data: int, stage: int) -> list[Cut]:
    """Return how each parameter is divided over data-parallel ranks.

    A rank holds a part of one flat buffer of all parameters (ZeRO 1, 2) or a part of every parameter (ZeRO 3).
    """
    sizes = [math.prod(stated.local_shape(Grid(tensor=tensor))) for stated in specs]
    partition_size = -(-sum(sizes) // data)
    cuts, offset = [], 0
    for i, (stated, size) in enumerate(zip(specs, sizes, strict=True)):
        flat = flat_intervals(offset, size, partition_size, data)
        cuts.append(Cut(f"{i}", stated, even_intervals(size, data) if stage == 3 else flat, torch.bfloat16))
        offset += size
    return cuts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size")
    parser.add_argument("--data", type=int, nargs="+", default=[1, 8, 32, 128], help="data-parallel sizes")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=(1, 2, 3), help="ZeRO stages")
    arguments = parser.parse_args()
    print(
        f"{'model':<7}{'ZeRO':>5}{'ranks':>7}{'mean/largest':>14}{'busiest/mean':>14}{'bound/mean':>12}"
        f"{'sent, mean':>12}{'busiest':>10}{'temporary':>11}{'plan':>8}"
    )
    print(f"{'':<7}{'':>5}{'':>7}{'':>14}{'':>14}{'':>12}{'MB bf16':>12}{'MB bf16':>10}{'MB bf16':>11}{'s':>8}")
    for name, model in LLAMA.items():
        specs = model.specs()
        for stage in arguments.stages:
            for data in arguments.data:
                cuts = zero_cuts(specs, arguments.tensor, data, stage)
                began = time.perf_counter()
                plan = make_plan(cuts, Grid(tensor=arguments.tensor, data=data), partial(flops, steps=5))
                seconds = time.perf_counter() - began
                mean = sum(plan.costs) / plan.ranks
                megabytes = 2 / 1e6
                print(
                    f"{name:<7}{stage:>5}{plan.ranks:>7}{mean / max(plan.costs):>14.2f}{plan.loads.max() / mean:>14.3f}"
                    f"{lower_bound(plan.costs, plan.ranks) / mean:>12.3f}{plan.sent.mean() * megabytes:>12,.1f}"
                    f"{plan.sent.max() * megabytes:>10,.1f}{plan.temporary.max() * megabytes:>11,.1f}{seconds:>8.2f}"
                )


if __name__ == "__main__":
    main()
