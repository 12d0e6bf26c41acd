"""A small random model of each family of Hugging Face, and training from its import on this launch's processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, TOKENS, STEPS, BATCH = 1000, 200, 3, 2
LR, DECAY, EPS = 3e-3, 0.1, 1e-4
IMPLEMENTATIONS = ("layer", "folded", "none")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 700.0}
_BLOCKS = ("q", "k", "v", "attention_out", "gate", "up", "down")


@dataclass(frozen=True)
class Published:
    """One family with every option away from its default."""

    family: str
    """Beginning of the names of transformers' classes."""
    options: dict[str, Any] = field(default_factory=dict)
    placement: Any = "all"
    exported: str = ""
    """Family of the export; empty: the same."""

    def build(self) -> Any:
        """Return transformers' model. Biases and the weights of norms are random too."""
        config = getattr(transformers, f"{self.family}Config")(**{**_SIZES, "rope_parameters": _ROPE, **self.options})
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            # Small queries and keys: where attention is sharp, the rounding of rotary angles shows in the logits.
            std = 0.03 if "q_proj" in name or "k_proj" in name else 0.1
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3 if "norm" in name else std)
        return model


FAMILIES = {
    # As Llama 3.2. Folded into a tied weight, the embedding's multipliers would reach the head.
    "llama, scaled rotary, tied": Published(
        "Llama",
        {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
        placement={role: ["row", "col"] for role in _BLOCKS},
    ),
    "llama, biases": Published("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral": Published("Mistral", {"sliding_window": None, "head_dim": 24}, exported="Llama"),
    "qwen2": Published("Qwen2"),
    "qwen3": Published("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "smollm3": Published(
        "SmolLM3",
        {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
}


def text() -> Tensor:
    """[BATCH, TOKENS + 1] random ids."""
    return torch.randint(0, VOCAB, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(11))


def train_theirs(model: Any) -> list[float]:
    """Train transformers' model with torch's AdamW and return the losses."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS)
    ids, losses = text(), []
    for _ in range(STEPS):
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_imported(folder: Path, tensor: int, sequence: bool) -> dict[str, dict[str, Any]]:
    """Train every family's import with every implementation of multipliers.

    Returns:
        By "FAMILY IMPLEMENTATION": the losses, and the logits of the first text before training, [seq, vocabulary].
    """
    found = {}
    for name, published in FAMILIES.items():
        for implementation in IMPLEMENTATIONS:
            found[f"{name} {implementation}"] = _trained(
                folder / name / "checkpoint", implementation, published.placement, tensor, sequence
            )
    return found


def _trained(checkpoint: Path, implementation: str, placement: Any, tensor: int, sequence: bool) -> dict[str, Any]:
    from megamult.checkpoint import resume
    from megamult.checkpoint.saved import SavedCheckpoint
    from megamult.config import Config, ModelConfig
    from megamult.distributed import start
    from megamult.distributed.config import ParallelConfig
    from megamult.distributed.mesh import current_mesh
    from megamult.effective.reading import EffectiveModel
    from megamult.multipliers.config import MultipliersConfig
    from megamult.optim.build import make_optimizer
    from megamult.optim.config import AdamWConfig, OptimizerConfig
    from megamult.parameters.stated import names_of
    from megamult.train.config import TrainConfig
    from megamult.train.model import build_model
    from megamult.zero.whole import WholePartition
    from tests.huggingface.workers import logits_of

    saved = SavedCheckpoint(checkpoint)
    config = Config(
        model=ModelConfig(**{**saved.info.config["model"], "z_loss": 0.0}),
        multipliers=MultipliersConfig(implementation, placement),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY, clip_grad_norm=1e9, adamw=AdamWConfig(eps=EPS)),
        parallel=ParallelConfig(tensor=tensor, sequence=sequence),
        train=TrainConfig(),
    )
    start.initialize(tensor)
    resume.check_fits(saved.info, config, VOCAB, None, EffectiveModel(saved).all_ones)
    model = build_model(config, VOCAB, seed=None)
    optimizer = make_optimizer(model, config.optimizer, config.multipliers)
    partition = WholePartition(optimizer.param_groups, names_of(model), current_mesh())
    optimizer.bind(partition)
    resume.restore(saved, partition, optimizer)
    ids, losses = text(), []
    logits = logits_of(model, ids[:1, :-1])
    for _ in range(STEPS):
        objective, entropy = model(ids[:, :-1], ids[:, 1:].contiguous())
        optimizer.zero_grad()
        objective.backward()
        optimizer.prepare(partition)
        optimizer.step()
        optimizer.finish()
        losses.append(entropy.item())
    return {"losses": losses, "logits": logits}
