"""Files of a Hugging Face model that do not depend on its weights, and the check of an output directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

TOKENIZER_FOLDER = "hf_tokenizer"
"""Folder, in an imported checkpoint, of the files of the tokenizer that came with it."""

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
"""Files that it may hold: those of a Hugging Face directory that do not depend on the weights."""

_DEFINING = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt", "added_tokens.json"))
"""Files of :data:`TOKENIZER_FILES` that decide on the token ids of a text; the first group that is there counts."""


def tokenizer_identity(files: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Return the identity of a tokenizer that is no sentencepiece model.

    Args:
        files: contents of a Hugging Face directory's files, by name.

    Returns:
        (names of the files that define the tokenizer, SHA-256). For one file it is that file's SHA-256, for several
        that of a text with a line "name SHA-256" for each. None: there is no tokenizer.
    """
    for names in _DEFINING:
        found = {name: hashlib.sha256(files[name]).hexdigest() for name in names if name in files}
        if names[0] in found:
            lines = "".join(f"{name} {digest}\n" for name, digest in found.items())
            digest = found[names[0]] if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()
            return ", ".join(f"{TOKENIZER_FOLDER}/{name}" for name in found), digest
    return None


def check_output(output: Path) -> None:
    """Check that writing the output would replace nothing.

    Raises:
        ValueError: something is there.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} exists and is no directory: choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: choose another output, or remove it")
