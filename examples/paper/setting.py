"""Sizes and hyperparameters that all runs of one set of experiments share, and the keys of the two optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.running.children import ROOT
from megamult.settings import flat

DEFAULT_CORPUS = "data/sotu"
"""Prefix of the corpus that launch/default_corpus.sh makes."""


@dataclass(frozen=True)
class Setting:
    """Configuration that an experiment's arms change.

    Learning rate and weight decay are chosen so that weights reach the equilibrium of noise and decay during the
    constant stage: its time constant is 1 / (2 lr weight_decay) steps. The rates of the two optimizers differ, and runs
    of different optimizers are never compared.
    """

    name: str
    base: Path
    """YAML file whose keys hold where `keys` does not say otherwise."""
    keys: Mapping[str, Any]
    rates: Mapping[str, tuple[float, float]]
    """(learning rate, weight decay) of each optimizer."""
    decay_factor: float = 8.0
    """Factor by which the learning rate falls in the decay stage."""
    corpus: str = DEFAULT_CORPUS
    """Prefix of a corpus that launch/prepare_data.py has written."""
    loaded: dict[str, Any] = field(init=False, repr=False, compare=False)
    """Keys of `base`, flat."""

    def __post_init__(self) -> None:
        # The instance is frozen, and the file is read once.
        object.__setattr__(self, "loaded", flat(yaml.safe_load(self.base.read_text(encoding="utf-8"))))

    def configuration(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flat configuration of a run: the base, the setting's keys, and an arm's overrides.

        `optimizer.name` chooses learning rate and weight decay, unless the arm overrides these too. The learning rate
        falls to `optimizer.lr` / `decay_factor`.
        """
        lr, weight_decay = self.rates[overrides.get("optimizer.name", "adamw")]
        lr = overrides.get("optimizer.lr", lr)
        found = {
            **self.loaded,
            **self.keys,
            "data.train": f"{self.corpus}_train",
            "data.valid": f"{self.corpus}_valid",
            "data.tokenizer": f"{self.corpus}.model",
            "optimizer.name": "adamw",
            "optimizer.lr": lr,
            "optimizer.weight_decay": weight_decay,
            "optimizer.min_lr": lr / self.decay_factor,
            **overrides,
        }
        return {key: _plain(value) for key, value in found.items()}

    @property
    def steps(self) -> int:
        """Number of steps of a run."""
        return int(self.keys["train.steps"])

    @property
    def constant_end(self) -> int:
        """Last step before the learning rate falls, at which norms are read."""
        return self.steps - int(self.keys["optimizer.decay_steps"])

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which the learning rate rises."""
        return int(self.keys["optimizer.warmup_steps"])


def _plain(value: Any) -> Any:
    """Return 2 for 2.0, so that a value has one spelling in a configuration."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def small(corpus: str = DEFAULT_CORPUS) -> Setting:
    """Return the setting for two cores, R1: the quickstart's model, 600 steps of 2,048 tokens, 2.5 minutes a run.

    The constant stage has 3 time constants. The learning rate falls exponentially by a factor of 8 over the last fifth.
    """
    steps, decay = 600, 120
    return Setting(
        "r1",
        ROOT / "examples" / "configs" / "quickstart.yaml",
        _schedule(steps, 30, decay) | {"train.eval_every": 120, "train.eval_batches": 20, "checkpoint.keep_every": 120},
        {"adamw": (4e-3, 0.8), "muon": (8e-3, 0.4)},
        corpus=corpus,
    )


def gpu(corpus: str) -> Setting:
    """Return the setting for one GPU: 16M parameters, bf16, 6,000 steps of 16,384 tokens, 8 time constants.

    A run reads 98M tokens. `corpus` needs 25M tokens or more, so that no text is seen more than four times.
    """
    return Setting(
        "gpu",
        ROOT / "examples" / "configs" / "quickstart.yaml",
        _schedule(6000, 300, 1000)
        | {
            "train.eval_every": 1000,
            "train.eval_batches": 20,
            "checkpoint.keep_every": 1000,
            "model.num_layers": 8,
            "model.hidden_size": 384,
            "model.ffn_hidden_size": 1024,
            "model.seq_length": 256,
            "train.global_batch_size": 64,
            "train.micro_batch_size": 64,
            "train.dtype": "bf16",
        },
        {"adamw": (2e-3, 0.4), "muon": (4e-3, 0.2)},
        corpus=corpus,
    )


def _schedule(steps: int, warmup: int, decay: int) -> dict[str, Any]:
    return {
        "train.steps": steps,
        "train.log_histograms_every": 0,
        "optimizer.warmup_steps": warmup,
        "optimizer.decay_steps": decay,
        "optimizer.decay": "exponential",
        # Checkpoints at these steps hold the norms that E2 and E5 read. They are also where an interrupted run goes on.
        "checkpoint.save_every": steps // 5 if steps < 1000 else 1000,
        "checkpoint.keep": 1,
    }
