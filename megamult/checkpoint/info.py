"""The file checkpoint.json: what a checkpoint holds beside its tensors about the run that wrote it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from typing import Any

from megamult.optim.legacy import modern

FORMAT = 1
"""Number that increases when older versions could not read the files any more."""

INFO = "checkpoint.json"

SENTENCEPIECE = "tokenizer.model"
"""Name, in a checkpoint's directory, of the sentencepiece model that the run's data was encoded with."""

_PACKAGES = ("megamult", "torch", "deepspeed", "megatron-core", "numpy", "safetensors", "sentencepiece")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class CheckpointInfo:
    """State of a run beside its tensors, and facts for whoever reads the checkpoint."""

    step: int
    """Optimizer steps."""
    samples: int
    """Sequences trained on so far, which is the number of the next one."""
    config: dict[str, Any]
    """The run's resolved configuration; one of an earlier version is read with today's keys of the optimizer."""
    vocab_size: int
    """Exact vocabulary size, without padding."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the files that define the tokenizer; None: unknown."""
    tokenizer_files: str = SENTENCEPIECE
    """Names of those files in the checkpoint; training reads sentencepiece models only."""
    optimizer: dict[str, Any] | None = None
    """`name`, `updates` (steps applied) and `skipped_steps`; None: there is no optimizer state."""
    data: dict[str, Any] | None = None
    """State of the training data (:meth:`megamult.data.dataset.BlendedDataset.state_dict`)."""
    layout: dict[str, int] = field(default_factory=dict)
    """Sharding of the run when it saved: processes, tensor, zero_stage."""
    figures: dict[str, float] = field(default_factory=dict)
    """Last measured figures: tokens, loss, valid_loss."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of the software that wrote it."""
    format: int = FORMAT
    """Format of the directory."""

    def to_json(self) -> bytes:
        """Return the content of checkpoint.json."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @staticmethod
    def from_json(content: bytes | str) -> CheckpointInfo:
        """Read checkpoint.json.

        Raises:
            ValueError: the file is damaged, or was written by a newer version.
        """
        loaded = json.loads(content)
        if not isinstance(loaded, dict):
            raise ValueError("it holds no JSON object")
        if loaded.get("format") != FORMAT:
            raise ValueError(
                f"its format is {loaded.get('format')!r} and this version of megamult reads {FORMAT}: install the "
                f"version that wrote it ({loaded.get('versions', {}).get('megamult')})"
            )
        config = loaded.get("config", {})
        if not isinstance(config, dict) or not isinstance(config.get("optimizer", {}), dict):
            raise ValueError("its configuration is no mapping of sections")
        if "optimizer" in config:
            config["optimizer"] = modern(config["optimizer"])
        known = {each.name for each in dataclasses.fields(CheckpointInfo)}
        try:
            return CheckpointInfo(**{key: value for key, value in loaded.items() if key in known})
        except TypeError as error:
            raise ValueError(f"it lacks a field ({error})") from None
