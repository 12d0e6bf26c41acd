"""How many kernels a rank of Llama-3 8B and 70B starts in an optimizer step, besides those of the optimizer's updates.

    python examples/benchmarks/step_launches.py

The program counts operations, without a GPU. A function that torch compiles for CUDA counts as one, and a view as none.
A `foreach` function of torch counts as one in the column `calls`, and once per tensor in the column `tensors` (on CUDA
a call is one kernel for some 100 tensors). The model has all layers, each 32 times narrower, and the slices that ZeRO 3
leaves on one of `--data` data-parallel ranks. The slices are cut into as many bands of rows as at full width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from muon_plan import LLAMA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megamult.distributed.mesh import ALONE
from megamult.multipliers import kernels, scaling
from megamult.optim.clip import LocalSquares
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.rates import Rates
from megamult.parameters import megatron
from megamult.parameters.roles import resolve
from megamult.parameters.spec import ParameterSpec
from megamult.zero.partition import Cut, Partition, Slice, even_intervals

NARROWER = 32
VOCABULARY = 128256


def specs(name: str, tensor: int) -> dict[str, ParameterSpec]:
    """Return the specs of one tensor-parallel rank's shards. Each shard is stated as a whole parameter."""
    model = LLAMA[name]
    hidden, ffn = model.hidden // NARROWER, model.ffn // NARROWER // tensor
    heads, groups = model.heads // tensor, max(1, model.groups // tensor)
    dim = max(2, hidden // (heads * tensor))
    block = {
        "qkv.weight": megatron.fused_qkv(heads, groups, dim, hidden),
        "proj.weight": megatron.single_matrix("attention_out", hidden, heads * dim, 1),
        "fc1.weight": megatron.fused_gate_up(ffn, hidden),
        "fc2.weight": megatron.single_matrix("down", hidden, ffn, 1),
        "norm_1": megatron.norm(hidden, False),
        "norm_2": megatron.norm(hidden, False),
    }
    rows = VOCABULARY // NARROWER // tensor
    found = {"embedding.weight": megatron.vocabulary("embedding", rows, rows, hidden)}
    found |= {f"{i}.{key}": stated for i in range(model.layers) for key, stated in block.items()}
    return found | {"norm": megatron.norm(hidden, False), "head": megatron.vocabulary("head", rows, rows, hidden)}


class RankPartition(Partition):
    """Partition of the slices that ZeRO 3 leaves on one data-parallel rank, with one buffer for each parameter."""

    sharded = True

    def __init__(self, stated: dict[str, ParameterSpec], data: int) -> None:
        self.mesh, self.group = ALONE, None  # collectives with other ranks are not counted
        self.slices, self.cuts, self._gradients = [], [], []
        for name, each in stated.items():
            intervals = even_intervals(torch.Size(each.shape).numel(), data)
            self.cuts.append(Cut(name, each, intervals, torch.bfloat16))
            start, length = intervals[data // 3]
            if length:
                master = torch.randn(length)
                self.slices.append(Slice(name, each, start, length, master, 0, master.bfloat16()))
                self._gradients.append(torch.randn(length))

    def gradients(self) -> list[Tensor]:
        """Return random gradients."""
        return self._gradients


class Launches(TorchDispatchMode):
    """Mode that counts operations other than views while it is entered."""

    calls = 0
    tensors = 0
    """Count like `calls`, except that every tensor of a `foreach` function counts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls += 1
            self.tensors += len(args[0]) if "_foreach_" in func.name() else 1
        return func(*args, **(kwargs or {}))

    def one(self, function: Any) -> Any:
        """Return a function that calls `function` and counts as one launch, whatever `function` does."""

        def compiled(*args: Any) -> Any:
            self.calls += 1
            self.tensors += 1
            with _disable_current_modes():
                return function(*args)

        return compiled


@contextmanager
def counting() -> Iterator[Launches]:
    """Count launches as on CUDA, where a fused function is one launch."""
    launches = Launches()
    fused = {
        "_scale_piece_compiled": launches.one(kernels._scale_piece),
        "_backward_piece_compiled": launches.one(kernels._backward_piece),
        "_compiled": lambda weight, spans, piece: True,
    }
    with patch.multiple(kernels, **fused), launches:
        yield launches


@torch.no_grad()
def report(name: str, tensor: int, data: int) -> None:
    """Print the rows of the table for one model."""
    partition = RankPartition(specs(name, tensor), data)
    with patch.dict(scaling._ELEMENTS, cpu=scaling._ELEMENTS["cuda"] // NARROWER**2):
        folded = FoldedMultipliers(resolve("all"), lr=1e-3).bind(
            partition, {each.tensor: {} for each in partition.slices}
        )
    squares = LocalSquares(partition, torch.device("cpu"), Rates())
    count = len(folded._scaling.bands)

    def write() -> None:
        folded._present = None  # as after an update of the multipliers
        with folded.latent_weights([each.tensor for each in partition.slices]):
            pass

    for work, do in (
        ("gradient norms", lambda: squares(partition.gradients())),
        ("chain rule, folded", lambda: folded.chain_rule(partition.gradients())),
        ("effective weights, folded", write),
    ):
        for _ in range(2):  # the first pass also makes indices; the second is printed
            with counting() as launches:
                do()
        print(
            f"{name:<7}{len(partition.slices):>8}{count:>8}{work:>27}{launches.calls:>8}{launches.tensors:>9}"
            f"{launches.calls / count:>10.1f}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size")
    parser.add_argument("--data", type=int, default=64, help="data-parallel size")
    arguments = parser.parse_args()
    print(f"{'model':<7}{'slices':>8}{'bands':>8}{'work':>27}{'calls':>8}{'tensors':>9}{'per band':>10}")
    for name in LLAMA:
        report(name, arguments.tensor, arguments.data)


if __name__ == "__main__":
    main()
