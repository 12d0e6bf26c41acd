"""How many kernels a rank starts, how often it waits for them, and what it sends: in a training step, without a GPU.

    python examples/benchmarks/step_launches.py                           # whole steps of a small Llama
    python examples/benchmarks/step_launches.py --tensor 2 --data 4
    python examples/benchmarks/step_launches.py --models                  # parts of the step of Llama-3 8B and 70B

Whole steps run on fake CUDA tensors, on rank 0 of --tensor x --data processes (`fake_step.py`), without multipliers,
with multipliers in the layers, and with folded ones, for AdamW and Muon, at ZeRO 0. A function that torch compiles for
CUDA counts as one launch, and a view as none. A `foreach` function counts as one (on CUDA a call is one kernel for some
100 tensors). A launch per parameter for each of DeepSpeed's copies, of gradients to fp32 and of masters to bf16, is left
out. Waits are those of megamult; DeepSpeed's engine, which is not run, has its own. --where prints operators and places.

With --models, parts of the optimizer step are counted, besides the updates. The model has all layers, each 32 times
narrower, and the slices that ZeRO 3 leaves on one of --data data-parallel ranks. The slices are cut into as many bands of
rows as at full width. A `foreach` function counts as one in the column `calls`, and once per tensor in `tensors`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import fake_cuda
import fake_step  # before torch

# isort: split
import torch
from muon_plan import LLAMA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.distributed.mesh import ALONE
from megamult.models.llama.config import ModelConfig
from megamult.multipliers import kernels, scaling
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.clip import LocalSquares
from megamult.optim.config import MuonConfig, OptimizerConfig
from megamult.optim.folded import FoldedMultipliers
from megamult.optim.rates import Rates
from megamult.parameters import megatron
from megamult.parameters.roles import resolve
from megamult.parameters.spec import ParameterSpec
from megamult.train.config import TrainConfig
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
    _inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not self._inside:
            self.calls += 1
            self.tensors += len(args[0]) if "_foreach_" in func.name() else 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def one_launch(self) -> Iterator[None]:
        """Count all operations inside the context as one."""
        self.calls += 1
        self.tensors += 1
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


@contextmanager
def counting() -> Iterator[Launches]:
    """Count launches as on CUDA, where a fused function is one launch."""
    launches = Launches()
    fake_cuda.COUNTING.append(launches)
    try:
        with patch.object(kernels, "_compiled", lambda weight, spans, piece: True), launches:
            yield launches
    finally:
        fake_cuda.COUNTING.pop()


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


def config_of(arguments: argparse.Namespace, implementation: str, optimizer: str) -> Config:
    """Return the configuration of a run whose whole steps are counted."""
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=512,
            num_attention_heads=8,
            num_query_groups=4,
            ffn_hidden_size=1408,
            seq_length=128,
        ),
        multipliers=MultipliersConfig(implementation=implementation, placement="all"),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(
            name=optimizer,  # type: ignore[arg-type]
            lr=1e-3,
            # Nothing can be timed, so the method is fixed.
            muon=MuonConfig(ns_form="standard") if optimizer == "muon" else None,
        ),
        parallel=ParallelConfig(tensor=arguments.tensor, zero_stage=0),
        train=TrainConfig(
            global_batch_size=2 * arguments.data, micro_batch_size=2, dtype="bf16", grad_accum_dtype="bf16", steps=10
        ),
    )


def whole(arguments: argparse.Namespace, implementation: str, optimizer: str) -> dict[str, Any]:
    """Return the counts of a micro-batch and of an optimizer step of one run."""
    config = config_of(arguments, implementation, optimizer)
    return fake_step.counts(config, fake_step.initialize(arguments.tensor, arguments.data))


def whole_steps(arguments: argparse.Namespace) -> None:
    """Print the table of whole steps, or JSON of it."""
    found = {}
    for implementation in ("none", "layer", "folded"):
        for optimizer in ("adamw", "muon"):
            found[f"{implementation} {optimizer}"] = whole(arguments, implementation, optimizer)
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"Llama with {arguments.layers} layers, rank 0 of tensor parallel {arguments.tensor} x data parallel "
        f"{arguments.data}, bf16, ZeRO 0, placement all; collectives as number (kB that the rank gives)"
    )
    print("| multipliers | optimizer | of a | launches | waits | collectives |\n|---|---|---|---|---|---|")
    for name, each in found.items():
        for part, counts in each.items():
            sent = ", ".join(f"{kind} {n} ({size / 1e3:,.0f})" for kind, (n, size) in counts["collectives"].items())
            waits = sum(counts["waits"].values())
            print(
                f"| {' | '.join(name.split())} | {part.replace('_', '-')} | {counts['launches']} | {waits} | "
                f"{sent or 'none'} |"
            )
            for key in ("waits", "where") if arguments.where else ():
                for what, number in counts[key].items():
                    print(f"    {number:>5} {what}")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true", help="parts of the optimizer step of Llama-3 8B and 70B")
    parser.add_argument("--tensor", type=int, help="tensor-parallel size; default: 1, and 8 with --models")
    parser.add_argument("--data", type=int, help="data-parallel size; default: 1, and 64 with --models")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model whose whole steps are counted")
    parser.add_argument("--where", action="store_true", help="print operators and places too")
    parser.add_argument("--json", action="store_true", help="print whole steps as JSON")
    arguments = parser.parse_args()
    arguments.tensor = arguments.tensor or (8 if arguments.models else 1)
    arguments.data = arguments.data or (64 if arguments.models else 1)
    if not arguments.models:
        whole_steps(arguments)
        return
    print(f"{'model':<7}{'slices':>8}{'bands':>8}{'work':>27}{'calls':>8}{'tensors':>9}{'per band':>10}")
    for name in LLAMA:
        report(name, arguments.tensor, arguments.data)


if __name__ == "__main__":
    main()
