"""The files of a Hugging Face model that do not depend on its weights, and the directory that a conversion writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

TOKENIZER_FOLDER = "hf_tokenizer"
"""The folder of an imported checkpoint with the files of the tokenizer that came with it."""

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
"""What it may hold: everything of a Hugging Face directory that does not depend on the weights."""

_DEFINING = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt", "added_tokens.json"))
"""Files that give a text its token ids, the most telling ones first; the others of :data:`TOKENIZER_FILES` do not."""


def tokenizer_identity(files: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Return the identity of a tokenizer that is no sentencepiece model.

    Args:
        files: of a Hugging Face directory, by name.

    Returns:
        (the names of the files that define it, their SHA-256): of the one file, as sha256sum prints it, or of a line
        with name and SHA-256 for each of them. None: there is no tokenizer.
    """
    for names in _DEFINING:
        found = {name: hashlib.sha256(files[name]).hexdigest() for name in names if name in files}
        if names[0] in found:
            lines = "".join(f"{name} {digest}\n" for name, digest in found.items())
            digest = found[names[0]] if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()
            return ", ".join(f"{TOKENIZER_FOLDER}/{name}" for name in found), digest
    return None


def check_output(output: Path) -> None:
    """Nothing is there that writing would replace.

    Raises:
        ValueError: something is.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} is there and is no directory: choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is there and is not empty: choose another output, or remove it")
