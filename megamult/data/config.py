"""The section `data` of a run's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megamult.validation import require

Sources = str | dict[str, float] | list[str]
"""Corpora as a user gives them: a prefix, a mapping from prefix to weight, or a list of prefixes."""


@dataclass
class DataConfig:
    """Corpora, their tokenizer, and how a run reads them."""

    train: Sources | None = None
    """Corpora to train on: the prefix of a .bin and an .idx, a list of prefixes (which get equal weights), or a mapping
    from prefix to weight."""
    valid: str | dict[str, Any] | list[str] | None = None
    """Corpora to evaluate on, given as in data.train, or several validation sets, each with a loss of its own: a
    mapping from the name of a set to its corpora, which are given as in data.train. null: no evaluation."""
    tokenizer: str | None = None
    """Tokenizer that the corpora were encoded with: a sentencepiece model, a tokenizer.json, or the directory of one of
    them. null: the corpora come without a tokenizer, as from Megatron's own tools. data.eod and model.vocab_size must
    then be set."""
    eod: int | str | None = None
    """End-of-document token, as id or as text. null: the one that the tokenizer's files call eos."""
    skip: list[list[int]] = field(default_factory=list)
    """Ranges of training samples to leave out: `[[first, last], ...]`, both included, sorted. Samples are numbered from
    0 in the data's order, whether or not they are left out: with train.global_batch_size 16 and nothing left out
    before, step 11 begins with sample 160. A run that resumes must keep the ranges that it has passed, and may add
    others that it has not reached."""
    document_mask: bool = False
    """Whether the documents in one sequence do not attend to each other, and positions begin anew in each document."""
    validate: Literal["stamp", "full"] = "stamp"
    """Check of the corpora at start-up. With `stamp`, sizes, headers and samples of the files are compared with the
    stamp that launch/prepare_data.py wrote. With `full`, every byte is read too, and all processes share the work."""

    @staticmethod
    def sources(value: Sources | None) -> list[tuple[str, float]]:
        """Return (prefix, weight) of each source."""
        if value is None:
            return []
        if isinstance(value, str):
            return [(value, 1.0)]
        if isinstance(value, dict):
            return list(value.items())
        return [(prefix, 1.0) for prefix in value]

    def validation_sets(self) -> dict[str, list[tuple[str, float]]]:
        """Return the sources of each validation set by its name. A set without a name has the key ""."""
        valid = self.valid
        if isinstance(valid, dict) and not all(_is_number(value) for value in valid.values()):
            return {name: self.sources(value) for name, value in valid.items()}
        sources = self.sources(valid)
        return {"": sources} if sources else {}

    def open_files(self) -> int:
        """Return how many files of the corpora a rank may hold open: for each source its .bin, its .idx, and the three
        index files of an epoch, of two epochs where one ends in a step."""
        blends = [self.sources(self.train), *self.validation_sets().values()]
        return 8 * sum(map(len, blends))

    def __post_init__(self) -> None:
        if isinstance(self.valid, dict):
            self._check_mapping(self.valid)
        mistakes = self._mistakes_of_skip()
        sets = {f"data.valid{f'.{name}' if name else ''}": sources for name, sources in self.validation_sets().items()}
        for key, sources in {"data.train": self.sources(self.train), **sets}.items():
            for prefix, weight in sources:
                if not weight > 0:
                    mistakes.append(f"{key} gives {prefix} the weight {weight}: it must be positive")
        require(not mistakes, "; ".join(mistakes))

    def _mistakes_of_skip(self) -> list[str]:
        mistakes, reached = [], -1
        for each in self.skip:
            if not (len(each) == 2 and 0 <= each[0] <= each[1]):
                mistakes.append(f"data.skip has {each}: give [first, last] with 0 <= first <= last")
                continue
            if each[0] <= reached:
                mistakes.append(
                    f"data.skip has {each} after a range up to {reached}: sort the ranges, and join those that overlap"
                )
            reached = max(reached, each[1])
        return mistakes

    @staticmethod
    def _check_mapping(valid: Mapping[str, Any]) -> None:
        """Check that a mapping is a blend or has named sets, and not something between."""
        numbers = [key for key, value in valid.items() if _is_number(value)]
        if len(numbers) == len(valid):
            return
        mistakes = []
        if numbers:
            mistakes.append(
                "data.valid has weights, as in a blend, and corpora, as in named validation sets (weights for "
                f"{', '.join(numbers)}; corpora for {', '.join(key for key in valid if key not in numbers)}): give "
                "every name its corpora, or every corpus a weight"
            )
        for name, value in valid.items():
            if name in numbers:
                continue
            if not re.fullmatch(r"[\w.-]+", name):
                mistakes.append(
                    f"data.valid has a set of the name {name!r}: names consist of letters, digits, '_', '-' and '.'"
                )
            if not _is_sources(value):
                mistakes.append(
                    f"data.valid.{name} is {value!r}: give a prefix, a list of prefixes, or a mapping from prefix to "
                    "weight"
                )
        require(not mistakes, "; ".join(mistakes))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sources(value: Any) -> bool:
    """Return whether a value names at least one corpus as data.train does."""
    if isinstance(value, dict):
        return bool(value) and all(_is_number(weight) for weight in value.values())
    if isinstance(value, list):
        return bool(value) and all(isinstance(prefix, str) for prefix in value)
    return isinstance(value, str) and bool(value.strip())
