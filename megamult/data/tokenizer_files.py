"""Names of a tokenizer's files, in a Hugging Face directory and in a checkpoint, and the identity that they give."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

SENTENCEPIECE = "tokenizer.model"
"""Name of the sentencepiece model in a checkpoint and in a Hugging Face directory."""

TOKENIZER_FOLDER = "hf_tokenizer"
"""Folder of a checkpoint that holds tokenizer files in Hugging Face's format."""

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
"""Groups of files, each of which defines the token ids of a text."""


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer files in a Hugging Face directory, by name."""
    return {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}


def tokenizer_identities(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return which files define a tokenizer, and hashes of their contents.

    Args:
        files: contents of the files in a Hugging Face directory, by name.

    Returns:
        {names of the files in a checkpoint: SHA-256} of each group of files that could define the tokenizer alone. The
        first is the one that `transformers` reads. If one file is the group, the SHA-256 is that of its content. If
        several are, it is that of a text with one line "name SHA-256" for each file.
    """
    identities = {}
    for names in _DEFINING:
        found = {name: hashlib.sha256(files[name]).hexdigest() for name in names if name in files}
        if names[0] in found:
            lines = "".join(f"{name} {digest}\n" for name, digest in found.items())
            digest = found[names[0]] if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()
            identities[", ".join(f"{TOKENIZER_FOLDER}/{name}" for name in found)] = digest
    return identities
