"""The section `data` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamult.validation import require


@dataclass
class DataConfig:
    """Corpora made by launch/prepare_data.py, and their tokenizer."""

    train: str | dict[str, float] | list[str] | None = None
    """Corpora to train on: the prefix of a .bin and an .idx, a list of prefixes (which get equal weights), or a mapping
    from prefix to weight."""
    valid: str | dict[str, float] | list[str] | None = None
    """Corpora to evaluate on, given as in data.train; null: no evaluation."""
    tokenizer: str | None = None
    """Tokenizer that the corpora were encoded with: a sentencepiece model, a tokenizer.json, or the directory of one of
    them. null: the corpora come without a tokenizer, as from Megatron's own tools. data.eod and model.vocab_size must
    then be set."""
    eod: int | str | None = None
    """End-of-document token, as id or as text. null: the one that the tokenizer's files call eos."""
    validate: Literal["stamp", "full"] = "stamp"
    """Check of the corpora at start-up. With `stamp`, sizes, headers and samples of the files are compared with the
    stamp that launch/prepare_data.py wrote. With `full`, every byte is read too, and all processes share the work."""

    @staticmethod
    def sources(value: str | dict[str, float] | list[str] | None) -> list[tuple[str, float]]:
        """Return (prefix, weight) of each source."""
        if value is None:
            return []
        if isinstance(value, str):
            return [(value, 1.0)]
        if isinstance(value, dict):
            return list(value.items())
        return [(prefix, 1.0) for prefix in value]

    def __post_init__(self) -> None:
        for key, value in (("train", self.train), ("valid", self.valid)):
            for prefix, weight in self.sources(value):
                require(weight > 0, f"data.{key} gives {prefix} the weight {weight}: it must be positive")
