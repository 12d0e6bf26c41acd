"""How many kernels a training step starts, how often the host waits for them, and what is sent: without a GPU.

    python examples/benchmarks/step_counts.py
    python examples/benchmarks/step_counts.py --tensor 2 --data 4

Whole steps of a small Llama run on fake CUDA tensors (`fake_step.py`), on rank 0 of --tensor x --data processes, at
ZeRO 0, without multipliers, with multipliers in the layers, and with folded ones, for AdamW and Muon. What torch
compiles for CUDA counts as one launch, and its backward operator by operator; a view counts as none, and a `foreach`
function as one (on CUDA a call is one kernel for some 100 tensors). DeepSpeed's engine does not run: its reduction of
gradients, its waits and its copies between bf16 and fp32 are left out. --where prints operators and places.

`step_launches.py` counts parts of the optimizer step of Llama-3 8B and 70B under ZeRO 3.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import fake_step  # before whatever imports torch

# isort: split
from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import MuonConfig, OptimizerConfig
from megamult.train.config import TrainConfig


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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--data", type=int, default=1, help="data-parallel size")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument("--where", action="store_true", help="print operators and places too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    whole_steps(parser.parse_args())


if __name__ == "__main__":
    main()
