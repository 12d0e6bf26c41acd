"""Random Falcon-H1 models of transformers, and what each rank computes from their imports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from tests.huggingface import workers
from tests.small import MODELS as SMALL

VOCAB, TOKENS, PROMPT, NEW = 1000, 200, 24, 32

_FACTORS: dict[str, Any] = {
    "embedding_multiplier": 5.1,
    "lm_head_multiplier": 0.25,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.9375,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.35, 0.6, 1.7, 0.5, 1.4],
    "mlp_multipliers": [0.88, 0.58],
}
"""All 14 forward multipliers away from 1."""

MODELS: dict[str, dict[str, Any]] = {
    "no norm, untied": {},
    "norm after gate, tied, two groups": {
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "mamba_n_groups": 2,
        "tie_word_embeddings": True,
    },
    # Biases, and all factors but those that would multiply a bias.
    "norm before gate, biases": {
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": True,
        "mamba_conv_bias": False,
        "attention_bias": True,
        "mlp_bias": True,
        "key_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "mlp_multipliers": [1.0, 1.0],
    },
}


@dataclass(frozen=True)
class SavedFalcon(workers.SavedModel):
    """A Falcon-H1 of two layers with random weights and multipliers."""

    ssm_groups: int = 1
    ssm_norm: str = "none"

    @property
    def config(self) -> Config:
        """Its configuration."""
        config = super().config
        config.model = replace(
            SMALL["falcon_h1"],
            num_layers=2,
            seq_length=workers.TOKENS,
            tie_embeddings=self.tied,
            ssm_groups=self.ssm_groups,
            ssm_norm=self.ssm_norm,
        )
        return config


SAVED = {
    "all, one group": SavedFalcon(2, "all"),
    "all, tied, two groups": SavedFalcon(2, "all", tied=True, ssm_groups=2, ssm_norm="after_gate"),
    "symmetry_free, folded": SavedFalcon(2, "symmetry_free", implementation="folded", ssm_norm="before_gate"),
    "scalar, tied": SavedFalcon(2, "scalar", tied=True),
}
"""Models whose multipliers differ from row to row. With one group, both ranks have copies of B and C."""


def build(name: str) -> Any:
    """One of MODELS, with random values in every parameter."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        mamba_d_ssm=48,
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=10,
        mamba_chunk_size=32,
        **{"mamba_n_groups": 1} | _FACTORS | MODELS[name],
    )
    generator = torch.Generator().manual_seed(len(name))
    model = FalconH1ForCausalLM(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("A_log"):
                value.copy_(noise.abs())
            elif key.endswith(("dt_bias", "conv1d.bias")):
                value.copy_(0.5 * noise - 1)
            elif key.endswith("bias"):
                value.copy_(0.3 * noise)
            elif value.dim() == 1:
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_((0.4 if "conv1d" in key else 0.12) * noise)
    return model


def tokens() -> Tensor:
    """[1, TOKENS] random ids."""
    return torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(5))


def of_imports(folder: Path, tensor: int) -> dict[str, dict[str, Any]]:
    """Return logits [seq, vocabulary] and 32 greedy tokens after a prompt, by the name of a checkpoint in `folder`.

    The tokens are there in one process only, and for forward multipliers as initial values only: the logits say as much
    of the rest.
    """
    from megamult.checkpoint import resume
    from megamult.checkpoint.saved import SavedCheckpoint
    from megamult.config import Config
    from megamult.distributed import start
    from megamult.distributed.config import ParallelConfig
    from megamult.distributed.mesh import current_mesh
    from megamult.models.architectures import model_section
    from megamult.multipliers.config import MultipliersConfig
    from megamult.optim.build import make_optimizer
    from megamult.parameters.stated import names_of
    from megamult.train.model import build_model
    from megamult.zero.whole import WholePartition
    from tests.huggingface.workers import logits_of

    start.initialize(tensor)
    found = {}
    for path in sorted(folder.iterdir()):
        saved = SavedCheckpoint(path)
        given = saved.info.config["multipliers"]
        config = Config(
            model=model_section(saved.info.config),
            multipliers=MultipliersConfig(given["implementation"], given["placement"]),
            parallel=ParallelConfig(tensor=tensor),
        )
        model = build_model(config, VOCAB, seed=None)
        optimizer = make_optimizer(model, config.optimizer, config.multipliers)
        partition = WholePartition(optimizer.param_groups, names_of(model), current_mesh())
        optimizer.bind(partition)
        resume.restore(saved, partition, optimizer)
        ids = tokens()[:, :PROMPT]
        for _ in range(NEW if "initial" in path.name and tensor == 1 else 0):
            ids = torch.cat([ids, logits_of(model, ids)[-1].argmax().view(1, 1)], dim=1)
        found[path.name] = {"logits": logits_of(model, tokens()), "greedy": ids[0, PROMPT:].tolist()}
    return found
