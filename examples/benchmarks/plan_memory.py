"""Memory of a rank as `launch/plan.py` computes it, beside what a step of two processes really holds, by kind.

    deepspeed --num_gpus 2 examples/benchmarks/plan_memory.py

The runs are examples/configs/tiny.yaml with the keys in `SHARDINGS`. Parameters, masters, gradients and optimizer state
are summed over their tensors after a step, and activations over the storages that autograd keeps for backward, so that
nothing depends on the allocator. A figure is that of the rank that needs most.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megamult.config import Config
from megamult.distributed import start
from megamult.multipliers import wrapped
from megamult.multipliers.parameters import full_precision
from megamult.optim.memory import FOLDED
from megamult.train.command_line import parse
from megamult.train.deepspeed_config import deepspeed_config
from megamult.train.deepspeed_engine import DeepSpeedEngine, build
from megamult.train.planning.estimate import sharded
from megamult.train.planning.memory import memory_of, saved_by
from megamult.train.planning.specs import model_specs

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SHARDINGS = (
    "--parallel.zero_stage 1 --train.dtype bf16",
    "--parallel.tensor 2 --parallel.sequence true --parallel.zero_stage 2 --optimizer.name muon "
    "--multipliers.implementation folded",
    "--parallel.zero_stage 3 --train.dtype bf16 --optimizer.name muon --train.recompute full",
)
"""Keys of each run."""

PARTS = {
    "weights": ("weights",),
    "fp32 masters": ("fp32 masters",),
    "gradients": ("gradients",),
    "optimizer state": ("moments", "momentum", FOLDED),
    "fp32 multipliers": ("fp32 multipliers",),
}
"""Kinds of the plan by the kind that is measured."""
ACTIVATIONS = "activations and logits"

Batches = Sequence[tuple[Tensor, Tensor]]


@contextlib.contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yield a mapping that fills with {address: bytes} of each storage that autograd saves in the context.

    Storages of the model's parameters and buffers are left out. Layers with multipliers have hooks of their own on what
    they save (:mod:`megamult.multipliers.wrapped`). torch calls only the innermost hooks, so theirs are watched too.
    """
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # else a storage could be freed, and its address used for another
    hooks = torch.autograd.graph.saved_tensors_hooks

    def own(tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [value for p in model.parameters() for value in vars(p).values() if isinstance(value, Tensor)]
        return any(each.untyped_storage().data_ptr() == address for each in tensors)

    def note(saved: Any) -> Any:
        if isinstance(saved, Tensor) and not own(saved):
            storage = saved.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(saved)
        return saved

    def watched(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return hooks(lambda tensor: note(pack(tensor)), unpack)

    with (
        mock.patch.object(wrapped.torch.autograd.graph, "saved_tensors_hooks", watched),
        hooks(note, lambda saved: saved),
    ):
        yield found


def total(*tensors: Tensor) -> int:
    """Return the bytes of tensors, each of which counts once."""
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in tensors}.values())


def masters(zero: Any) -> list[Tensor]:
    """Return the fp32 masters where DeepSpeed's optimizer keeps them; none if it wraps none."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return [each for group in getattr(zero, "fp32_groups", []) for each in group]


def gradients(zero: Any, model: torch.nn.Module, stage: int) -> int:
    """Return the bytes of gradients at the end of a micro-batch, where DeepSpeed keeps them."""
    of_parameters = [g for p in model.parameters() for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
    if stage == 3:
        return total(zero.grad_partitions_flat_buffer)
    if hasattr(zero, "fp32_groups_gradients_flat"):
        return total(*zero.fp32_groups_gradients_flat)
    summed = [each for group in getattr(zero, "averaged_gradients", {}).values() for each in group or ()]
    return total(*of_parameters, *summed)


def activations(engine: DeepSpeedEngine, tokens: Tensor, labels: Tensor) -> int:
    """Return the bytes that the forward pass of one micro-batch keeps for backward."""
    with saved_storages(engine.model) as storages:
        engine.deepspeed(tokens, labels)
    return sum(storages.values())


def multipliers(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the multipliers that forward passes read in fp32 beside the model's own."""
    return [p for p in model.parameters() if full_precision(p) is not p]


def measured(engine: DeepSpeedEngine, stage: int, batches: Batches) -> dict[str, int]:
    """Take a step, and return the bytes of what the rank that needs most holds, by kind. Collective over all ranks."""
    zero, peak = engine.deepspeed.optimizer, 0
    step = engine.deepspeed.step

    def after_backward(*arguments: Any) -> Any:
        nonlocal peak
        peak = max(peak, gradients(zero, engine.model, stage))
        return step(*arguments)

    saved = activations(engine, *batches[0])
    with mock.patch.object(engine.deepspeed, "step", after_backward):
        engine.train_batch(iter(batches), len(batches))
    optimizer = engine.optimizer
    state = [each for kept in optimizer.state.values() for each in kept.values() if isinstance(each, Tensor)]
    state += [values for *_, values in optimizer._store.all_rows()]
    if optimizer.folded is not None:
        state += [*optimizer.folded.state_dict().values(), optimizer.folded.gradient]
    found = {
        "weights": total(*(getattr(p, "ds_tensor", p.data) for p in engine.model.parameters())),
        "fp32 masters": total(*masters(zero)),
        "gradients": peak,
        "optimizer state": total(*(each for each in state if each.numel() > 1)),
        "fp32 multipliers": total(*(full_precision(p) for p in multipliers(engine.model))),
        ACTIVATIONS: saved,
    }
    largest = engine.mesh.max_over(torch.tensor(list(found.values()), dtype=torch.float64)).tolist()
    return dict(zip(found, map(int, largest), strict=True))


def planned(config: Config, vocab_size: int, processes: int) -> dict[str, int]:
    """Return the bytes of a rank as they are planned, by kind of the plan, and of activations with logits."""
    held = sharded(config, model_specs(config, vocab_size), processes, cuda=False)
    zero = deepspeed_config(config, held.grid.data, cuda=False).get("zero_optimization", {})
    found = dict(memory_of(config, vocab_size, held.partition, held.optimizer, zero, cuda=False).by_kind)
    saved = saved_by(config, vocab_size, cuda=False)
    return found | {ACTIVATIONS: saved.activations(config.train.recompute == "full") + saved.logits}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=2000, help="number of tokens")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    vocab_size = parser.parse_args().vocab_size
    own = ["--config", str(TINY), "--data.tokenizer", "null", "--model.vocab_size", str(vocab_size)]
    configs = [parse([*own, *keys.split()])[0] for keys in SHARDINGS]
    plans = [planned(each, vocab_size, 2) for each in configs]  # before there are process groups
    for keys, config, plan in zip(SHARDINGS, configs, plans, strict=True):
        mesh = start.initialize(config.parallel.tensor)
        engine = build(config, vocab_size, mesh)
        generator = torch.Generator().manual_seed(mesh.rank_on("data"))
        shape = (config.train.micro_batch_size, config.model.seq_length)
        batches = [
            (torch.randint(0, vocab_size, shape, generator=generator), torch.randint(0, vocab_size, shape))
            for _ in range(config.accumulation(mesh.size_of("data")))
        ]
        held = measured(engine, config.parallel.zero_stage, batches)
        engine.deepspeed.destroy()
        if mesh.rank == 0:
            print(keys)
            expected = {kind: sum(plan.get(each, 0) for each in PARTS.get(kind, (kind,))) for kind in held}
            rows = [(kind, expected[kind], held[kind]) for kind in held]
            for kind, made, found in [*rows, ("together", sum(expected.values()), sum(held.values()))]:
                ratio = f"{made / found:>10.4f}" if found else f"{'-':>10}"
                print(f"  {kind:<24}{made:>12,} planned{found:>12,} measured{ratio}")
    start.destroy()


if __name__ == "__main__":
    main()
