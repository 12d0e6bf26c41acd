"""Costs of multipliers, in the layers or folded: the relative speed of training, added memory and collectives.

    python examples/benchmarks/layer_overhead.py                                     # speed and memory, one process
    python examples/benchmarks/layer_overhead.py --implementations folded            # only this one and none
    deepspeed --num_gpus 2 examples/benchmarks/layer_overhead.py --collectives       # collectives at TP 2

Speed: one process has an engine without multipliers and one for each implementation. The engines take whole optimizer
steps in turn, so that they run under the same conditions, and the engine that goes first rotates. A step is
--accumulation micro-batches of --batch sequences, and tokens per second count all of them. A ratio is the ratio of the
medians. Default sizes are those of the project's target for this device.

Memory that folded multipliers add: bytes of the optimizer's state after the last step, minus those without multipliers,
per element of this rank's matrices that have multipliers. The multipliers with their gradients and moments are reported
separately.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import DeepSpeedEngine, build
from megamult.train.model import build_model

VOCAB = 4096
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter")


def run_config(arguments: argparse.Namespace, implementation: str, tensor: int = 1, sequence: bool = False) -> Config:
    """Return the configuration of a run with the benchmark's sizes, with or without multipliers."""
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // 64,
            ffn_hidden_size=arguments.ffn,
            seq_length=arguments.seq,
        ),
        multipliers=MultipliersConfig(implementation=implementation, placement="all"),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=1e-4),
        parallel=ParallelConfig(tensor=tensor, sequence=sequence, zero_stage=1),
        train=TrainConfig(
            global_batch_size=arguments.batch * arguments.accumulation,
            micro_batch_size=arguments.batch,
            dtype=arguments.dtype,
            steps=1000,
        ),
    )


def batch_of(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random tokens and labels, [batch, seq]."""
    text = torch.randint(0, VOCAB, (arguments.batch, arguments.seq + 1), generator=torch.Generator().manual_seed(0))
    return tuple(part.contiguous().to(device.local_device()) for part in (text[:, :-1], text[:, 1:]))  # type: ignore[return-value]


def optimizer_step(engine: DeepSpeedEngine, tokens: torch.Tensor, labels: torch.Tensor, accumulation: int) -> float:
    """Take one optimizer step with all its micro-batches; return its seconds."""
    began = time.perf_counter()
    for _ in range(accumulation):
        objective, _ = engine.deepspeed(tokens, labels)
        engine.deepspeed.backward(objective)
        engine.deepspeed.step()
    if device.has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> None:
    """Print tokens per second of each implementation, their ratios, and the memory that folded multipliers add."""
    mesh = start.initialize(1)
    if torch.distributed.get_world_size() > 1:
        raise SystemExit("speed is measured in one process: start this with python, or count with --collectives")
    names = list(dict.fromkeys(["none", *arguments.implementations]))
    engines = {name: build(run_config(arguments, name), VOCAB, mesh) for name in names}
    tokens, labels = batch_of(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    progress = tqdm(total=len(names) * (arguments.warmup + arguments.steps), unit="step")
    for step in range(arguments.warmup + arguments.steps):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            elapsed = optimizer_step(engines[name], tokens, labels, arguments.accumulation)
            if step >= arguments.warmup:
                seconds[name].append(elapsed)
            progress.update()
    progress.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"hidden {arguments.hidden}, ffn {arguments.ffn}, {arguments.layers} layers, {arguments.seq} x "
        f"{arguments.batch} tokens x {arguments.accumulation} micro-batches, {arguments.dtype}, placement all, "
        f"{device.local_device().type}, {torch.get_num_threads()} threads, medians of {arguments.steps} steps"
    )
    print(f"{'multipliers':<14}{'tokens/s':>12}{'range/median':>14}{'ratio to none':>15}")
    for name, times in seconds.items():
        rate = tokens.numel() * arguments.accumulation / median[name]
        spread = (max(times) - min(times)) / median[name]
        print(f"{name:<14}{rate:>12,.1f}{spread:>14.3f}{median['none'] / median[name]:>15.4f}")
    for name in names[1:]:
        print(f"ratio {name} / none: {median['none'] / median[name]:.4f}")
    if "folded" in engines:
        print_memory(engines["folded"], engines["none"])
    start.destroy()


def print_memory(folded: DeepSpeedEngine, none: DeepSpeedEngine) -> None:
    """Print the bytes that folded multipliers add to this rank's optimizer. Both engines must have taken a step."""
    settings, multipliers = folded.optimizer.folding, folded.optimizer.folded
    assert settings is not None and multipliers is not None
    added = tensor_bytes(folded.optimizer.state.values()) - tensor_bytes(none.optimizer.state.values())
    vectors = tensor_bytes([{**multipliers.state_dict(), "gradient": multipliers.gradient}])
    elements = sum(piece.length for piece in folded.partition.slices if settings.covers(piece.spec))
    print(
        f"memory that folded adds: {added / elements:.4f} bytes per matrix element ({added:,} bytes, {elements:,} "
        f"elements), and vectors: {vectors / elements:.4f} ({vectors:,} bytes, {multipliers.values.numel():,} "
        "multipliers)"
    )


def tensor_bytes(states: Iterable[dict[str, Any]]) -> int:
    """Return the bytes of all tensors in an optimizer's state."""
    held = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count calls of torch.distributed's collectives, also under the names to which Megatron has bound them."""
    from megatron.core.tensor_parallel import layers, mappings

    counts: collections.Counter[str] = collections.Counter()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    places = [(torch.distributed, name, name) for name in COLLECTIVES]
    for module in (layers, mappings):
        places.append((module, "dist_all_gather_func", "all_gather_into_tensor"))
        places.append((module, "dist_reduce_scatter_func", "reduce_scatter_tensor"))
    originals = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in places]
    for (module, attribute, name), (_, _, original) in zip(places, originals, strict=True):
        setattr(module, attribute, wrap(name, original))
    try:
        yield counts
    finally:
        for module, attribute, original in originals:
            setattr(module, attribute, original)


def count_collectives(arguments: argparse.Namespace) -> None:
    """Print the number of collectives in one micro-batch's forward and backward pass at TP 2."""
    start.initialize(2)
    tokens, labels = batch_of(arguments)
    rank = torch.distributed.get_rank()
    if rank == 0:
        print(f"{'SP':<5}{'multipliers':<13}" + "".join(f"{name:>24}" for name in COLLECTIVES[:3]) + f"{'sum':>6}")
    for sequence in (False, True):
        sums = {}
        for name in ("none", "layer"):
            model = build_model(run_config(arguments, name, tensor=2, sequence=sequence), VOCAB, seed=1)
            model.to(device.local_device())
            with counted() as counts:
                model(tokens, labels)[0].backward()
            sums[name] = sum(counts.values())
            if rank == 0:
                row = "".join(f"{counts[key]:>24}" for key in COLLECTIVES[:3])
                label = "all" if name == "layer" else "none"
                print(f"{'on' if sequence else 'off':<5}{label:<13}{row}{sums[name]:>6}")
        if rank == 0:
            print(f"collectives that multipliers add, per micro-batch: {sums['layer'] - sums['none']}")
    start.destroy()


def main() -> None:
    """Run the command line."""
    cuda = device.has_cuda()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024 if cuda else 512, help="model width")
    parser.add_argument("--ffn", type=int, default=2816 if cuda else 1408, help="width of the gated MLP")
    parser.add_argument("--layers", type=int, default=24 if cuda else 4, help="transformer layers")
    parser.add_argument("--seq", type=int, default=2048 if cuda else 512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per optimizer step")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=("none", "layer", "folded"),
        default=["none", "layer", "folded"],
        help="of multipliers, to measure; none is the base, and always runs",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="dtype of parameters and activations")
    parser.add_argument("--steps", type=int, default=30 if cuda else 7, help="measured optimizer steps of each")
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1, help="optimizer steps of each before measuring")
    parser.add_argument("--collectives", action="store_true", help="count collectives at TP 2 instead")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (count_collectives if arguments.collectives else measure)(arguments)


if __name__ == "__main__":
    main()
