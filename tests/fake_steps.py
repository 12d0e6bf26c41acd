"""Training steps on fake CUDA tensors, for `tests/test_fake_steps.py`: prints what they do as JSON.

A process of its own, because it must begin before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import fake_step
import step_counts

# isort: split
import torch

from megamult.config import Config
from megamult.multipliers.config import MultipliersConfig
from megamult.train.model import build_model
from tests.small import MODELS


def steps(tensor: int, data: int, *kinds: tuple[str, str]) -> dict[str, Any]:
    """The counts of whole steps, by "implementation optimizer"."""
    arguments = argparse.Namespace(layers=2 if tensor == 1 else 1, tensor=tensor, data=data)
    return {" ".join(kind): step_counts.whole(arguments, *kind) for kind in kinds}


def hybrid() -> dict[str, Any]:
    """The counts of a Falcon-H1 with layers of every kind."""
    config: Config = step_counts.config_of(argparse.Namespace(layers=2, tensor=1, data=1), "layer", "muon")
    config.model = MODELS["hybrid"]  # type: ignore[assignment]
    return fake_step.counts(config, fake_step.initialize(1, 1))


def problem_of_a_buffer_on_the_cpu(what: str) -> str:
    """What is said of a step in which one tensor has stayed on the CPU."""
    config: Config = step_counts.config_of(argparse.Namespace(layers=1, tensor=1, data=1), "layer", "adamw")
    config.multipliers = MultipliersConfig(implementation="layer")
    fake_step.initialize(1, 1)
    with fake_step.fake_cuda_device(), fake_step.Watch():
        model: Any = build_model(config, fake_step.VOCABULARY, seed=None)
        norm, order = model.decoder.final_layernorm, torch.arange(config.model.seq_length)
        if what == "index":  # torch copies it to the device, and waits
            norm.register_forward_hook(lambda module, given, out: out[order])
        elif what == "norm":
            norm.weight = torch.nn.Parameter(torch.ones(norm.weight.shape, dtype=norm.weight.dtype))
        tokens = torch.zeros(2, config.model.seq_length, dtype=torch.long, device="cpu" if what == "tokens" else "cuda")
        try:
            model(tokens, tokens)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    """Print everything."""
    every = [(implementation, optimizer) for implementation in ("none", "layer", "folded") for optimizer in OPTIMIZERS]
    found = {
        "alone": steps(1, 1, *every),
        "sharded": steps(2, 4, ("layer", "muon"), ("folded", "muon")),
        "hybrid": {"layer muon": hybrid()},
        "on the CPU": {what: problem_of_a_buffer_on_the_cpu(what) for what in ("index", "norm", "tokens", "")},
    }
    print(json.dumps(found))


OPTIMIZERS = ("adamw", "muon")

if __name__ == "__main__":
    main()
