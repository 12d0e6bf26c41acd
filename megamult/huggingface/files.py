"""Files of a Hugging Face model that do not depend on its weights, and the check of an output directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

TOKENIZER_FOLDER = "hf_tokenizer"
"""Folder of an imported checkpoint that holds the Hugging Face model's tokenizer files."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Names of files that :data:`TOKENIZER_FOLDER` may have. They do not depend on the weights of the model."""

_DEFINING = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt", "added_tokens.json"))
"""Groups of files that define the token ids of a text. If a model has several groups, only the first of them counts."""


def tokenizer_identity(files: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Return which files define a tokenizer, and a hash of their contents.

    Args:
        files: contents of the files in a Hugging Face directory, by name.

    Returns:
        (names of the files, SHA-256), or None if there is no tokenizer. If one file defines the tokenizer, the SHA-256
        is the hash of this file. If several do, it is the hash of a text with one line "name SHA-256" for each file.
    """
    for names in _DEFINING:
        found = {name: hashlib.sha256(files[name]).hexdigest() for name in names if name in files}
        if names[0] in found:
            lines = "".join(f"{name} {digest}\n" for name, digest in found.items())
            digest = found[names[0]] if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()
            return ", ".join(f"{TOKENIZER_FOLDER}/{name}" for name in found), digest
    return None


def check_output(output: Path) -> None:
    """Check that an output directory does not exist or is empty, so that writing to it replaces nothing.

    Raises:
        ValueError: `output` is a directory that is not empty, another kind of file, or a symbolic link.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} exists and is a file or a symbolic link, not a directory: choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: choose another output, or remove this directory")
