"""Traffic per optimizer step and memory per rank at each ZeRO stage, in bf16 with gradients accumulated in fp32.

    deepspeed --num_gpus 2 examples/benchmarks/zero_stages.py --stage 1     # counted, on a small model
    python examples/benchmarks/zero_stages.py --arithmetic                  # Llama-3 8B and 70B, by the counted rules

The first command counts the collectives that reach the backend in one step of --accumulation micro-batches. It also
counts the bytes of all tensors that Python can reach: between steps, and at their peak while gradients are reduced.
Activations that autograd saves are not among these tensors. All figures are per parameter, so that they apply to other
sizes.

The second command calculates the seconds in which a rank communicates and computes nothing. It assumes one step of
--tokens tokens per rank, a ring that moves --link gigabytes per second through a rank, and --flops TFLOP/s of a rank.
The default of --link is the rate of one 400 Gb/s network adapter: it assumes one rank of a data-parallel group in each
node, as at tensor parallel 8. A group with several ranks in a node can use the adapters of all of them.
ZeRO 1 reduces gradients after the last backward pass. ZeRO 2 and 3 reduce them during every backward pass, and only the
time by which the communication takes longer than the pass counts.
"""

from __future__ import annotations

import argparse
import collections
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.distributed.mesh import Mesh, current_mesh
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import DeepSpeedEngine, build
from megamult.zero.traffic import RING, waited, whole_bytes

VOCAB = 512
STAGES = (1, 2, 3)
PARAMETERS = {"8B": 8.03e9, "70B": 70.55e9}
"""Numbers of parameters of Llama 3 (arXiv 2407.21783), by the model's name."""
BUCKET = 50_000_000
"""Number of elements that ZeRO reduces together by default."""

_WARMUP = 3
"""Number of optimizer steps before the one that is counted."""

_MESSAGES = {torch.float32: "reduce_scatter", torch.bfloat16: "allgather"}
"""Collective that messages between processes stand for over gloo (`megamult/distributed/parts.py`), by their dtype."""


class Wire(TorchDispatchMode):
    """Mode that counts collectives and their bytes by kind, and calls `sample` at each collective."""

    def __init__(self, sample: Callable[[], None], ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes: dict[str, float] = collections.defaultdict(float)
        self._sample = sample

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [each for each in _flat(args) if isinstance(each, torch.Tensor)]
            if name in ("send", "recv_"):
                kind = _MESSAGES[tensors[0].dtype]
                # A rank sends D - 1 of the D parts of the whole tensor.
                whole = _bytes(tensors[0]) * self._ranks / (self._ranks - 1) if name == "send" else 0
            else:
                found = next((kind for kind in RING if name.strip("_").startswith(kind)), None)
                if found is None:
                    raise RuntimeError(f"c10d.{name}: a collective that this benchmark does not know")
                kind = found
                # If a tensor is scattered or gathered, the larger of input and output is the whole tensor.
                whole = sum(map(_bytes, tensors)) if kind == "allreduce" else max(map(_bytes, tensors))
            self.calls[kind] += 1
            self.bytes[kind] += whole
            self._sample()
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> list[Any]:
    return [leaf for each in value for leaf in _flat(each)] if isinstance(value, (list, tuple)) else [value]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def reachable() -> collections.Counter[str]:
    """Return the bytes of the storages of all tensors that Python can reach, by dtype."""
    storages: dict[int, tuple[str, int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search touches deprecated attributes of modules
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = (str(thing.dtype).removeprefix("torch."), storage.nbytes())
    total: collections.Counter[str] = collections.Counter()
    for dtype, size in storages.values():
        total[dtype] += size
    return total


@dataclass
class Counted:
    """Figures of one optimizer step at one stage on this rank. All except `calls` are in bytes per parameter."""

    calls: dict[str, int]
    whole: dict[str, float]
    """Bytes of the whole tensors that collectives worked on, by kind."""
    sent: float
    """Bytes that a ring moves through this rank."""
    kept: dict[str, float]
    peak: float


def count(stage: int, arguments: argparse.Namespace, mesh: Mesh) -> Counted:
    """Count one optimizer step of a small model. Earlier steps create the optimizer's state and ZeRO 3's trace."""
    ranks = current_mesh().groups["data"].size()
    config = Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=4,
            ffn_hidden_size=4 * arguments.hidden,
            seq_length=16,
        ),
        multipliers=MultipliersConfig(implementation="none"),
        parallel=ParallelConfig(zero_stage=stage),
        train=TrainConfig(
            global_batch_size=ranks * arguments.accumulation,
            micro_batch_size=1,
            dtype="bf16",
            steps=_WARMUP + 1,
        ),
        deepspeed={
            "zero_optimization": {
                # ZeRO 1 reduces and gathers once per step, without buckets.
                **(
                    {}
                    if stage == 1
                    else {"reduce_bucket_size": arguments.bucket, "allgather_bucket_size": arguments.bucket}
                ),
                # As in a large model, no parameter is small enough to stay whole, and few whole ones fit at once.
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": arguments.bucket,
                "stage3_max_live_parameters": arguments.bucket,
                "stage3_max_reuse_distance": 0,
            }
        },
    )
    engine = build(config, VOCAB, mesh)
    elements = sum(cut.spec.numel_logical for cut in engine.partition.cuts)
    for _ in range(_WARMUP):
        step(engine, arguments.accumulation)
    peak = 0

    def sample() -> None:
        nonlocal peak
        peak = max(peak, sum(reachable().values()))

    with Wire(sample, ranks) as wire:
        step(engine, arguments.accumulation)
    gc.collect()
    kept = reachable()
    engine.deepspeed.destroy()
    share = (ranks - 1) / ranks
    return Counted(
        dict(wire.calls),
        {kind: size / elements for kind, size in wire.bytes.items()},
        sum(share * RING[kind] * size for kind, size in wire.bytes.items()) / elements,
        {dtype: size / elements for dtype, size in kept.items() if size > 0.005 * elements},
        peak / elements,
    )


def step(engine: DeepSpeedEngine, accumulation: int) -> None:
    """Take one optimizer step on random tokens."""
    text = torch.randint(0, VOCAB, (1, 17), generator=torch.Generator().manual_seed(0)).to(device.local_device())
    for _ in range(accumulation):
        objective, _ = engine.deepspeed(text[:, :-1].contiguous(), text[:, 1:].contiguous())
        engine.deepspeed.backward(objective)
        engine.deepspeed.step()


def kept_bytes(stage: int, ranks: int) -> dict[str, float]:
    """Return the bytes per parameter that a rank keeps while it accumulates gradients, by kind of state."""
    return {
        "parameters": 2.0 / (ranks if stage == 3 else 1),
        "gradients": 4.0 / (ranks if stage > 1 else 1),
        "masters and moments": 12.0 / ranks,
    }


def print_counted(arguments: argparse.Namespace) -> None:
    """Print what one step of the stage sends and keeps."""
    mesh = start.initialize(1)
    counted = count(arguments.stage, arguments, mesh)
    if torch.distributed.get_rank() == 0:
        print(
            f"ZeRO {arguments.stage}, {torch.distributed.get_world_size()} ranks, {arguments.accumulation} "
            "micro-batches per step, bf16, sums in fp32"
        )
        print(f"{'collective':<16}{'calls':>6}{'bytes per parameter':>21}")
        for kind in sorted(counted.calls):
            print(f"{kind:<16}{counted.calls[kind]:>6}{counted.whole[kind]:>21.2f}")
        print(f"a ring sends from each rank {counted.sent:.2f} bytes per parameter")
        by_dtype = ", ".join(f"{dtype} {size:.2f}" for dtype, size in sorted(counted.kept.items()))
        print(f"kept {sum(counted.kept.values()):.2f} ({by_dtype}), at most {counted.peak:.2f} bytes per parameter")
    start.destroy()


def waiting(stage: int, parameters: float, accumulation: int, ranks: int, arguments: argparse.Namespace) -> float:
    """Return the seconds of one step in which a rank with `parameters` parameters only communicates."""
    share = (ranks - 1) / ranks
    seconds = {
        kind: share * RING[kind] * size * parameters / (arguments.link * 1e9)
        for kind, size in whole_bytes(stage, accumulation).items()
    }
    gathering = seconds.pop("allgather")
    forward = 2 * parameters * arguments.tokens / accumulation / (arguments.flops * 1e12)
    return waited(stage, accumulation, sum(seconds.values()), gathering, forward, 2 * forward)


def print_arithmetic(arguments: argparse.Namespace) -> None:
    """Print the gigabytes that a rank keeps and the seconds that it waits, for published sizes."""
    ranks = arguments.data_parallel
    print(
        f"data parallel {ranks}, {arguments.tokens:,} tokens per rank and step, {arguments.link:.0f} GB/s, "
        f"{arguments.flops:.0f} TFLOP/s"
    )
    print(f"{'':<41}s waited in a step of so many micro-batches")
    columns = "".join(f"{count:>9}" for count in arguments.accumulations)
    print(f"{'model':<7}{'TP':>3}{'ZeRO':>6}{'GB kept':>9}{'GB buckets':>12}{columns}")
    for name, whole in PARAMETERS.items():
        for tensor in (1, 8):
            parameters = whole / tensor
            for stage in STAGES:
                kept = sum(kept_bytes(stage, ranks).values()) * parameters / 1e9
                # ZeRO 1 reduces gradients in place. ZeRO 2 and 3 have a bucket in bf16, another that fills while the
                # first is reduced, and a copy in fp32.
                buckets = (0 if stage == 1 else BUCKET * (2 + 2 + 4)) / 1e9
                row = "".join(
                    f"{waiting(stage, parameters, count, ranks, arguments):>9.2f}" for count in arguments.accumulations
                )
                print(f"{name:<7}{tensor:>3}{stage:>6}{kept:>9.1f}{buckets:>12.1f}{row}")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stage", type=int, choices=STAGES, default=2, help="ZeRO stage to count")
    made.add_argument("--hidden", type=int, default=128, help="model width of the counted model")
    made.add_argument("--layers", type=int, default=4, help="transformer layers of the counted model")
    made.add_argument("--accumulation", type=int, default=4, help="micro-batches per optimizer step")
    made.add_argument("--bucket", type=int, default=200_000, help="elements reduced or gathered together")
    made.add_argument("--arithmetic", action="store_true", help="print the table for published sizes instead")
    made.add_argument("--data_parallel", type=int, default=64, help="ranks that share the batch")
    made.add_argument("--tokens", type=int, default=65536, help="tokens per rank and optimizer step")
    made.add_argument("--accumulations", type=int, nargs="+", default=[1, 2, 4, 8], help="micro-batches per step")
    made.add_argument("--link", type=float, default=50.0, help="GB/s that a ring moves through a rank")
    made.add_argument("--flops", type=float, default=400.0, help="TFLOP/s of a rank in matrix products")
    made.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Run the command line: count collectives and bytes, or calculate them for published sizes."""
    arguments = parser().parse_args()
    (print_arithmetic if arguments.arithmetic else print_counted)(arguments)


if __name__ == "__main__":
    main()
