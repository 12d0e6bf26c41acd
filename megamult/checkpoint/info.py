"""What a checkpoint says of the run that wrote it, beside its tensors: checkpoint.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from typing import Any

from megamult.optim.legacy import modern

FORMAT = 1
"""Raised when an older version could not read what a newer one writes."""

INFO = "checkpoint.json"

SENTENCEPIECE = "tokenizer.model"
"""The sentencepiece model in a checkpoint's directory that the run's data was encoded with."""

_PACKAGES = ("megamult", "torch", "deepspeed", "megatron-core", "numpy", "safetensors", "sentencepiece")


def versions() -> dict[str, str]:
    """Of Python and the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class CheckpointInfo:
    """The state of a run that is no tensor, and what a reader should know of it."""

    step: int
    """Optimizer steps."""
    samples: int
    """Sequences trained on: the next one's number."""
    config: dict[str, Any]
    """The run's resolved configuration; one of an earlier version is read with today's keys of the optimizer."""
    vocab_size: int
    """Exact, without padding."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the files that define the tokenizer; None: not known."""
    tokenizer_files: str = SENTENCEPIECE
    """Names of those files in the checkpoint; training reads a sentencepiece model only."""
    optimizer: dict[str, Any] | None = None
    """`name`, `updates` (steps applied) and `skipped_steps`; None: there is no optimizer state."""
    data: dict[str, Any] | None = None
    """Where the training data's present blend began (:meth:`megamult.data.BlendedDataset.state_dict`)."""
    layout: dict[str, int] = field(default_factory=dict)
    """How the run was spread when it saved: processes, tensor, zero_stage."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last ones that were measured: tokens, loss, valid_loss."""
    versions: dict[str, str] = field(default_factory=versions)
    """Of what wrote it."""
    format: int = FORMAT
    """Of the directory."""

    def to_json(self) -> bytes:
        """What checkpoint.json holds."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @staticmethod
    def from_json(content: bytes | str) -> CheckpointInfo:
        """Read checkpoint.json.

        Raises:
            ValueError: it is damaged, or written by a newer version.
        """
        loaded = json.loads(content)
        if not isinstance(loaded, dict):
            raise ValueError("it holds no JSON object")
        if loaded.get("format") != FORMAT:
            raise ValueError(
                f"its format is {loaded.get('format')!r} and this version of megamult reads {FORMAT}: install the "
                f"version that wrote it ({loaded.get('versions', {}).get('megamult')})"
            )
        optimizer = loaded.get("config", {}).get("optimizer")
        if optimizer is not None:
            loaded["config"]["optimizer"] = modern(optimizer)
        known = {each.name for each in dataclasses.fields(CheckpointInfo)}
        try:
            return CheckpointInfo(**{key: value for key, value in loaded.items() if key in known})
        except TypeError as error:
            raise ValueError(f"it lacks a field ({error})") from None
