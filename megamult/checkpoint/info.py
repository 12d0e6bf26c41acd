"""The file checkpoint.json of a checkpoint: state of the run apart from its tensors, and facts about the run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from typing import Any

from megamult.data.tokenizer_files import SENTENCEPIECE
from megamult.multipliers.config import CLIP_OF_BOOL
from megamult.optim.legacy import modern

FORMAT = 1
"""Number of the format of a checkpoint. It increases when older versions of megamult can no longer read the files."""

INFO = "checkpoint.json"

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
    """State of a run apart from its tensors, and facts for readers of the checkpoint."""

    step: int
    """Number of optimizer steps done so far."""
    samples: int
    """Number of sequences trained on so far. Those that `data.skip` leaves out are not among them."""
    config: dict[str, Any]
    """The run's resolved configuration. `from_json` replaces keys and values of earlier versions by present ones."""
    vocab_size: int
    """Exact vocabulary size, without padding."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the files that define the tokenizer, or None if it is unknown."""
    tokenizer_files: str = SENTENCEPIECE
    """Names of these files in the checkpoint, joined by ", "."""
    tokenizer_also: dict[str, str] = field(default_factory=dict)
    """Further files in the checkpoint that define the same tokenizer in another format: SHA-256 by their names."""
    eod: int | None = None
    """Id of the token that ends a document in the run's corpora, or None if it is unknown."""
    optimizer: dict[str, Any] | None = None
    """`name`, `updates` (steps applied), `skipped_steps` and `choices` (what update rules have chosen by measuring, by
    kind of parameter; absent in earlier versions), or None if there is no optimizer state."""
    data: dict[str, Any] | None = None
    """State of the training data (:meth:`megamult.data.dataset.BlendedDataset.state_dict`)."""
    drawn: bool = True
    """Whether the run began with weights that it drew at random. If not, it began with imported weights."""
    layout: dict[str, int] = field(default_factory=dict)
    """Sharding of the run at the time of the save: `processes`, `tensor` and `zero_stage`."""
    figures: dict[str, float] = field(default_factory=dict)
    """Last measured figures: `tokens`, `loss` and `valid_loss`."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of the software that wrote the checkpoint."""
    format: int = FORMAT
    """Format of the checkpoint, see `FORMAT`."""

    @property
    def tokenizers(self) -> dict[str, str]:
        """{file name: SHA-256} of all files that define the tokenizer; empty if the tokenizer is unknown."""
        known = {} if self.tokenizer_sha256 is None else {self.tokenizer_files: self.tokenizer_sha256}
        return known | self.tokenizer_also

    @tokenizers.setter
    def tokenizers(self, found: dict[str, str]) -> None:
        first = next(iter(found), None)
        self.tokenizer_files, self.tokenizer_sha256 = (SENTENCEPIECE, None) if first is None else (first, found[first])
        self.tokenizer_also = {files: digest for files, digest in found.items() if files != first}

    def to_json(self) -> bytes:
        """Return the content of checkpoint.json."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @staticmethod
    def from_json(content: bytes | str) -> CheckpointInfo:
        """Read the content of checkpoint.json.

        Raises:
            ValueError: the content is damaged, or a newer version of megamult wrote it.
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
            raise ValueError("the checkpoint's configuration is not a mapping of sections")
        if "optimizer" in config:
            config["optimizer"] = modern(config["optimizer"])
        multipliers = config.get("multipliers")
        if isinstance(multipliers, dict) and isinstance(multipliers.get("clip"), bool):  # as in earlier versions
            multipliers["clip"] = CLIP_OF_BOOL[multipliers["clip"]]
        known = {each.name for each in dataclasses.fields(CheckpointInfo)}
        try:
            return CheckpointInfo(**{key: value for key, value in loaded.items() if key in known})
        except TypeError as error:
            raise ValueError(f"it lacks a field ({error})") from None
