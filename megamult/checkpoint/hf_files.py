"""The files of a Hugging Face model that do not depend on its weights, and the directory that a conversion writes."""

from __future__ import annotations

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


def check_output(output: Path) -> None:
    """Nothing is there that writing would replace.

    Raises:
        ValueError: something is.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} is there and is no directory: choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is there and is not empty: choose another output, or remove it")
