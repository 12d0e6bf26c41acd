"""megamult: pretraining with learnable row and column multipliers on Megatron-Core and DeepSpeed."""

from __future__ import annotations

import importlib
from typing import Any

from megamult.noise import quiet

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "megamult.zero.attach",
    "DistributedMuon": "megamult.optim.muon.rule",
    "FALCON_H1_RULES": "megamult.integrations.falcon_h1",
    "fold": "megamult.integrations.fold",
    "gpt_layer_spec": "megamult.models.llama.layer",
    "LLAMA_RULES": "megamult.integrations.llama",
    "MISTRAL_RULES": "megamult.integrations.llama",
    "QWEN2_RULES": "megamult.integrations.llama",
    "QWEN3_RULES": "megamult.integrations.llama",
    "megatron_rules": "megamult.integrations.megatron",
    "merge": "megamult.multipliers.merge",
    "param_groups": "megamult.optim.param_groups",
    "TwoPhaseAdamW": "megamult.optim.two_phase_adamw",
    "TwoPhaseOptimizer": "megamult.optim.two_phase",
}

__all__ = ["__version__", *_PUBLIC]


quiet()  # before Megatron and DeepSpeed are imported, which warn at their import


def __getattr__(name: str) -> Any:
    # Import a module on first use, so that the command line's --help does not wait for DeepSpeed and Megatron.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'megamult' has no attribute {name!r}")
